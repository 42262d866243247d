"""Data sets of Hugging Face's `datasets` library: hub, parquet, WebDataset, streams."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.reading import WHITE, BrokenPicture, read_picture
from afa.reading.broken import MissingCaption
from afa.training.data.images import Stored, StreamedImages

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from PIL import Image

    from afa.reading.picture import Colour
    from afa.training.recipe import DatasetRecipe


class DatasetImages:
    """A data set on disk; of a list of captions, the first is used.

    Args:
        rows: a `datasets.Dataset` whose pictures are not decoded.
        recipe: names of the columns.
        background: colour on which transparent pictures are composited.
    """

    def __init__(self, rows: Any, recipe: DatasetRecipe, background: Colour = WHITE) -> None:
        self._rows, self._recipe, self._background = rows, recipe, background
        #: warnings for the user, one line each
        self.warnings = _warnings(rows.features, recipe)

    def __repr__(self) -> str:
        return f"DatasetImages({self._recipe.path!r}, {len(self)} pictures)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return _Row(self._rows[index], self._recipe, index, self._background)()

    def captions(self) -> Iterator[str | None]:
        """All captions in order, without reading pictures; None for a missing one."""
        column = self._recipe.caption_column
        for index, row in enumerate(self._rows.select_columns([column.split(".")[0]])):
            yield _caption(row, self._recipe, f"row {index}")

    def stored(self, index: int) -> Stored:
        """The bytes or the file of the picture, and its caption."""
        return _stored(self._rows[index], self._recipe)

    def name(self, index: int) -> str:
        """The index of the row, with the picture's file name if the row has it."""
        return _name(self._rows[index], self._recipe, index)

    @property
    def fingerprint(self) -> str:
        """The library's fingerprint, which depends on rows, files and their order."""
        columns = f"{self._recipe.image_column}, {self._recipe.caption_column}"
        return f"dataset {self._rows._fingerprint} {columns} on {self._background}"


class DatasetStream(StreamedImages):
    """A stream; of a list of captions, the first is used.

    Args:
        rows: a `datasets.IterableDataset` whose pictures are not decoded.
        recipe: path and names of the columns.
        limit: maximum number of samples; None has no limit.
        files: the files of each split, as `DataFilesList` of `datasets`.
        background: colour on which transparent pictures are composited.
    """

    def __init__(
        self,
        rows: Any,
        recipe: DatasetRecipe,
        limit: int | None,
        files: Mapping[Any, Any],
        background: Colour = WHITE,
    ) -> None:
        self._rows, self._recipe, self._limit, self._files = rows, recipe, limit, files
        self._background = background
        #: warnings for the user, one line each
        self.warnings = _warnings(rows.features, recipe)

    def __iter__(self) -> Iterator[_Row]:
        rows = self._rows if self._limit is None else self._rows.take(self._limit)
        for index, row in enumerate(rows):
            yield _Row(row, self._recipe, index, self._background)

    @property
    def fingerprint(self) -> str:
        """The recipe, the limit, the background and a hash of the files' state.

        The state of a local file is its size and mtime; that of a remote one is the library's
        metadata, the commit of a hub repository or an ETag.
        """
        digest = hashlib.sha256()
        for split, files in sorted(self._files.items(), key=lambda item: str(item[0])):
            known = getattr(files, "origin_metadata", None)
            digest.update(json.dumps([str(split), list(files), known]).encode())
            for address in files:
                for part in address.split("::"):  # fsspec's syntax for a file in an archive
                    if os.path.isfile(part):
                        stat = os.stat(part)
                        digest.update(json.dumps([stat.st_size, stat.st_mtime_ns]).encode())
        settings = self._recipe.model_dump_json()
        return f"stream {settings} limit {self._limit} {digest.hexdigest()} on {self._background}"


@dataclass(frozen=True)
class _Row:
    """A row whose picture is not decoded; a `SampleReader`."""

    row: Any
    recipe: DatasetRecipe
    index: int
    background: Colour

    def __call__(self) -> tuple[Image.Image, str]:
        """Decode the picture.

        Raises:
            BrokenSample: if the picture cannot be decoded, or it or the caption is missing.
            AfaError: if a column has another type than a picture or text.
        """
        row, recipe = self.row, self.recipe
        name = _name(row, recipe, self.index)
        picture, caption = _value(row, recipe.image_column), _caption(row, recipe, name)
        sample = f"{name} of the data set '{recipe.path}'"
        if caption is None:
            raise MissingCaption(
                "AFA-TRAIN-021",
                f"{sample} has no caption in the column '{recipe.caption_column}'. Add it, or "
                "remove the row.",
            )
        if isinstance(picture, dict):  # a picture that is not decoded
            place = picture.get("path")
            picture = picture.get("bytes") or (Path(place) if place else None)
        if picture is None:
            raise BrokenPicture(
                "AFA-TRAIN-022",
                f"{sample} has no picture in the column '{recipe.image_column}'. Add it, or "
                "remove the row.",
            )
        if not isinstance(picture, bytes | Path):
            raise AfaError(
                "AFA-TRAIN-023",
                f"{sample} must have a picture in the column '{recipe.image_column}'; got a "
                f"{type(picture).__name__}.",
            )
        return read_picture(picture, name, background=self.background), caption

    def stored(self) -> Stored:
        return _stored(self.row, self.recipe)


def open_dataset(
    recipe: DatasetRecipe, limit: int | None, background: Colour = WHITE
) -> DatasetImages | DatasetStream:
    """Open a data set of the `datasets` library.

    Args:
        recipe: path and names of the columns.
        limit: maximum number of samples; None has no limit.
        background: colour on which transparent pictures are composited.

    Raises:
        AfaError: if it cannot be loaded, is empty or lacks a column.
    """
    from datasets import Image as ImageFeature
    from datasets import disable_progress_bars, load_dataset, load_dataset_builder

    disable_progress_bars()
    named: dict[str, Any] = {"data_files": recipe.data_files, "revision": recipe.revision}
    files: Mapping[Any, Any] = {}
    try:
        if recipe.streaming:
            builder = load_dataset_builder(recipe.path, recipe.name, **named)
            files = builder.config.data_files or {}
            rows = builder.as_streaming_dataset(split=recipe.split)
        else:
            rows = load_dataset(recipe.path, recipe.name, split=recipe.split, **named)
        features = rows.features or next(iter(rows.take(1)))
    except Exception as error:  # of datasets, pyarrow, fsspec or the hub
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise AfaError(
            "AFA-TRAIN-017",
            f"The library `datasets` cannot load the data set '{recipe.path}': {message}",
        ) from error
    for key in ("image_column", "caption_column"):
        column = getattr(recipe, key).split(".")[0]
        if column not in features:
            raise AfaError(
                "AFA-TRAIN-018",
                f"The data set '{recipe.path}' has no column '{column}'; it has "
                f"{', '.join(features)}. Set data.dataset.{key} to one of them.",
            )
    if isinstance(features[recipe.image_column.split(".")[0]], ImageFeature):
        # afa decodes the pictures, so that it can skip and name broken ones
        rows = rows.cast_column(recipe.image_column, ImageFeature(decode=False))
    if recipe.streaming:
        return DatasetStream(rows, recipe, limit, files, background)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if len(rows) == 0:
        raise AfaError(
            "AFA-TRAIN-019", f"The data set '{recipe.path}' has no rows; it must have pictures."
        )
    return DatasetImages(rows, recipe, background)


def _value(row: Any, column: str) -> Any:
    """The value of a column; dots separate the names of nested columns."""
    for key in column.split("."):
        row = row[key] if isinstance(row, dict) else None
    return row


def _name(row: Any, recipe: DatasetRecipe, index: int) -> str:
    picture = _value(row, recipe.image_column)
    path = picture.get("path") if isinstance(picture, dict) else None
    key = row.get("__key__")  # of WebDataset
    return f"row {index}" + "".join(f" ({part})" for part in (path or key,) if part)


def _stored(row: Any, recipe: DatasetRecipe) -> Stored:
    """The stored form of a row; a missing picture or caption is empty."""
    picture, caption = (_value(row, c) for c in (recipe.image_column, recipe.caption_column))
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    if isinstance(picture, dict):
        picture = picture.get("bytes") or Path(picture.get("path") or "")
    known = picture if isinstance(picture, bytes | Path) else b""
    return Stored(known, caption if isinstance(caption, str) else "")


def _warnings(features: Any, recipe: DatasetRecipe) -> list[str]:
    """A warning if captions are lists; the features of a stream may be unknown."""
    from datasets import LargeList, List

    kind = (features or {}).get(recipe.caption_column)
    if not isinstance(kind, List | LargeList | list):
        return []
    return [
        f"The column '{recipe.caption_column}' has lists of captions; only the first caption of "
        "each list is used. To use all of them, write one row per caption."
    ]


def _caption(row: Any, recipe: DatasetRecipe, name: str) -> str | None:
    """The caption of a row, or the first of several; None if it is missing.

    Raises:
        AfaError: if the column does not contain text.
    """
    caption = _value(row, recipe.caption_column)
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    if caption is not None and not isinstance(caption, str):
        raise AfaError(
            "AFA-TRAIN-020",
            f"{name} of the data set '{recipe.path}' must have text in the column "
            f"'{recipe.caption_column}'; got {caption!r}.",
        )
    return caption
