"""Data sets of the Hugging Face `datasets` library: hub, parquet, WebDataset, streams."""

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
    """A data set whose rows are on disk.

    Where a row has a list of captions, the first is used.

    Args:
        rows: a `datasets.Dataset` whose pictures are not decoded.
        recipe: its columns.
        background: that transparent pictures are composited on.
    """

    def __init__(self, rows: Any, recipe: DatasetRecipe, background: Colour = WHITE) -> None:
        self._rows, self._recipe, self._background = rows, recipe, background
        #: what a user should know of the data set, one line each
        self.warnings = _warnings(rows.features, recipe)

    def __repr__(self) -> str:
        return f"DatasetImages({self._recipe.path!r}, {len(self)} pictures)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        row = self._rows[index]
        return _sample(row, self._recipe, _name(row, self._recipe, index), self._background)

    def captions(self) -> Iterator[str | None]:
        """All captions in order, without reading a picture; None for those that are missing."""
        column = self._recipe.caption_column
        for index, row in enumerate(self._rows.select_columns([column.split(".")[0]])):
            yield _caption(row, self._recipe, f"row {index}")

    def stored(self, index: int) -> Stored:
        """The picture's bytes, or the file that the row names, and its caption."""
        return _stored(self._rows[index], self._recipe)

    def name(self, index: int) -> str:
        """The picture's file where the row tells it, else its row."""
        return _name(self._rows[index], self._recipe, index)

    @property
    def fingerprint(self) -> str:
        """The library's own, which differs where rows, files or their order do."""
        columns = f"{self._recipe.image_column}, {self._recipe.caption_column}"
        return f"dataset {self._rows._fingerprint} {columns} on {self._background}"


class DatasetStream(StreamedImages):
    """A data set that is read from its beginning, never as a whole.

    Where a row has a list of captions, the first is used.

    Args:
        rows: a `datasets.IterableDataset` whose pictures are not decoded.
        recipe: where it is, and its columns.
        limit: how many samples at the most.
        files: by split, the files that the library found, as `DataFilesList` of `datasets`.
        background: that transparent pictures are composited on.
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
        #: what a user should know of the data set, one line each
        self.warnings = _warnings(rows.features, recipe)

    def __iter__(self) -> Iterator[_Row]:
        rows = self._rows if self._limit is None else self._rows.take(self._limit)
        for index, row in enumerate(rows):
            yield _Row(row, self._recipe, index, self._background)

    @property
    def fingerprint(self) -> str:
        """The recipe and all files that the library found for it.

        Of a local file, its size and time of change; of one elsewhere, what the library asked for:
        the commit of a hub's repository, or an ETag.
        """
        digest = hashlib.sha256()
        for split, files in sorted(self._files.items(), key=lambda item: str(item[0])):
            known = getattr(files, "origin_metadata", None)
            digest.update(json.dumps([str(split), list(files), known]).encode())
            for address in files:
                for part in address.split("::"):  # a file in an archive, as fsspec writes it
                    if os.path.isfile(part):
                        stat = os.stat(part)
                        digest.update(json.dumps([stat.st_size, stat.st_mtime_ns]).encode())
        settings = self._recipe.model_dump_json()
        return f"stream {settings} limit {self._limit} {digest.hexdigest()} on {self._background}"


@dataclass(frozen=True)
class _Row:
    """A row that is not decoded yet; see `afa.training.data.images.SampleReader`."""

    row: Any
    recipe: DatasetRecipe
    index: int
    background: Colour

    def __call__(self) -> tuple[Image.Image, str]:
        name = _name(self.row, self.recipe, self.index)
        return _sample(self.row, self.recipe, name, self.background)

    def stored(self) -> Stored:
        return _stored(self.row, self.recipe)


def open_dataset(
    recipe: DatasetRecipe, limit: int | None, background: Colour = WHITE
) -> DatasetImages | DatasetStream:
    """A data set of the `datasets` library.

    Args:
        recipe: where it is, and its columns.
        limit: how many samples at the most.
        background: that transparent pictures are composited on.

    Raises:
        AfaError: it cannot be had, or lacks a column; says which it has.
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
    except Exception as error:  # the library's own, pyarrow's, fsspec's, the hub's
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise AfaError(
            "AFA-TRAIN-017",
            f"The data set '{recipe.path}' must be one that `datasets` reads, but it says {said}",
        ) from error
    for key in ("image_column", "caption_column"):
        column = getattr(recipe, key).split(".")[0]
        if column not in features:
            raise AfaError(
                "AFA-TRAIN-018",
                f"The data set '{recipe.path}' has no column '{column}', it has "
                f"{', '.join(features)}. Name one of them as {key}.",
            )
    if isinstance(features[recipe.image_column.split(".")[0]], ImageFeature):
        # bytes as they are: a broken picture is ours to skip and to name
        rows = rows.cast_column(recipe.image_column, ImageFeature(decode=False))
    if recipe.streaming:
        return DatasetStream(rows, recipe, limit, files, background)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if len(rows) == 0:
        raise AfaError(
            "AFA-TRAIN-019", f"The data set '{recipe.path}' must hold pictures; it is empty."
        )
    return DatasetImages(rows, recipe, background)


def _value(row: Any, column: str) -> Any:
    """A column's value; dots go into nested ones."""
    for key in column.split("."):
        row = row[key] if isinstance(row, dict) else None
    return row


def _name(row: Any, recipe: DatasetRecipe, index: int) -> str:
    picture = _value(row, recipe.image_column)
    path = picture.get("path") if isinstance(picture, dict) else None
    key = row.get("__key__")  # of WebDataset
    return f"row {index}" + "".join(f" ({part})" for part in (path or key,) if part)


def _stored(row: Any, recipe: DatasetRecipe) -> Stored:
    """A row's picture as it is kept, and its caption; both empty where there is none."""
    picture, caption = (_value(row, c) for c in (recipe.image_column, recipe.caption_column))
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    if isinstance(picture, dict):
        picture = picture.get("bytes") or Path(picture.get("path") or "")
    known = picture if isinstance(picture, bytes | Path) else b""
    return Stored(known, caption if isinstance(caption, str) else "")


def _warnings(features: Any, recipe: DatasetRecipe) -> list[str]:
    """Whether captions come in lists; a stream may not know its features."""
    from datasets import LargeList, List

    kind = (features or {}).get(recipe.caption_column)
    if not isinstance(kind, List | LargeList | list):
        return []
    return [
        f"Of the captions of each picture in the column '{recipe.caption_column}' only the first "
        "is used. For all of them, give each a row of its own."
    ]


def _caption(row: Any, recipe: DatasetRecipe, name: str) -> str | None:
    """The caption of a row, the first where there are several; None where it has none.

    Raises:
        AfaError: the column holds something else than text.
    """
    caption = _value(row, recipe.caption_column)
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    if caption is not None and not isinstance(caption, str):
        raise AfaError(
            "AFA-TRAIN-020",
            f"{name} of the data set '{recipe.path}' must have a text in the column "
            f"'{recipe.caption_column}', came {caption!r}.",
        )
    return caption


def _sample(
    row: Any, recipe: DatasetRecipe, name: str, background: Colour
) -> tuple[Image.Image, str]:
    picture, caption = _value(row, recipe.image_column), _caption(row, recipe, name)
    of = f"{name} of the data set '{recipe.path}'"
    remedy = "Fill it in or take the row out."
    if caption is None:
        raise MissingCaption(
            "AFA-TRAIN-021",
            f"{of} must have a caption in the column '{recipe.caption_column}'; it has none. "
            f"{remedy}",
        )
    if isinstance(picture, dict):  # a picture that is not decoded
        place = picture.get("path")
        picture = picture.get("bytes") or (Path(place) if place else None)
    if picture is None:
        raise BrokenPicture(
            "AFA-TRAIN-022",
            f"{of} must have a picture in the column '{recipe.image_column}'; it has none. "
            f"{remedy}",
        )
    if not isinstance(picture, bytes | Path):
        raise AfaError(
            "AFA-TRAIN-023",
            f"{of} must have a picture in the column '{recipe.image_column}', came a "
            f"{type(picture).__name__}.",
        )
    return read_picture(picture, name, background=background), caption
