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
from afa.training.data.rows import as_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from PIL import Image

    from afa.reading.picture import Colour
    from afa.training.recipe import DatasetRecipe

#: usual names of columns, which are found if the recipe names none
_PICTURES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_CAPTIONS = ("text", "caption", "captions", "prompt", "prompts", "txt")


class DatasetImages:
    """A data set on disk.

    Args:
        rows: a `datasets.Dataset` whose pictures are not decoded.
        recipe: names of the columns.
        background: colour on which transparent pictures are composited.
        several: whether all captions of a picture are used, or the first.
    """

    def __init__(
        self,
        rows: Any,
        recipe: DatasetRecipe,
        background: Colour = WHITE,
        several: bool = False,
    ) -> None:
        self._rows, self._recipe, self._background = rows, recipe, background
        self._several = several
        #: warnings for the user, one line each
        self.warnings = _warnings(rows.features, recipe, several)
        #: where the pictures come from, for the user
        self.source = f"the data set '{recipe.path}'"

    def __repr__(self) -> str:
        return f"DatasetImages({self._recipe.path!r}, {len(self)} pictures)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self._row(index)()

    def sample(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See `afa.training.data.images.sample_of`."""
        return self._row(index).sample()

    def _row(self, index: int) -> _Row:
        return _Row(self._rows[index], self._recipe, index, self._background, self._several)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """See `afa.training.data.images.captions_in`."""
        columns = dict.fromkeys(column.split(".")[0] for column in self._recipe.caption_columns)
        for index, row in enumerate(self._rows.select_columns(list(columns))):
            yield _captions(row, self._recipe, f"row {index}", self._several)

    def stored(self, index: int) -> Stored:
        """The bytes or the file of the picture, and its captions."""
        return self._row(index).stored()

    def name(self, index: int) -> str:
        """The index of the row, with the picture's file name if the row has it."""
        return _name(self._rows[index], self._recipe, index)

    @property
    def fingerprint(self) -> str:
        """The library's fingerprint, which depends on rows, files and their order."""
        columns = ", ".join([self._recipe.image_column, *self._recipe.caption_columns])
        several = " with all captions" if self._several else ""
        return f"dataset {self._rows._fingerprint} {columns} on {self._background}{several}"


class DatasetStream(StreamedImages):
    """A stream.

    Args:
        rows: a `datasets.IterableDataset` whose pictures are not decoded.
        recipe: path and names of the columns.
        limit: maximum number of samples; None has no limit.
        files: the files of each split, as `DataFilesList` of `datasets`.
        background: colour on which transparent pictures are composited.
        several: whether all captions of a picture are used, or the first.
    """

    def __init__(
        self,
        rows: Any,
        recipe: DatasetRecipe,
        limit: int | None,
        files: Mapping[Any, Any],
        background: Colour = WHITE,
        several: bool = False,
    ) -> None:
        self._rows, self._recipe, self._limit, self._files = rows, recipe, limit, files
        self._background, self._several = background, several
        #: warnings for the user, one line each
        self.warnings = _warnings(rows.features, recipe, several)
        #: where the pictures come from, for the user
        self.source = f"the stream '{recipe.path}'"

    def __iter__(self) -> Iterator[_Row]:
        rows = self._rows if self._limit is None else self._rows.take(self._limit)
        for index, row in enumerate(rows):
            yield _Row(row, self._recipe, index, self._background, self._several)

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
        several = " with all captions" if self._several else ""
        return (
            f"stream {settings} limit {self._limit} {digest.hexdigest()} on {self._background}"
            f"{several}"
        )


@dataclass(frozen=True)
class _Row:
    """A row whose picture is not decoded; a `SampleReader`."""

    row: Any
    recipe: DatasetRecipe
    index: int
    background: Colour
    several: bool

    def __call__(self) -> tuple[Image.Image, str]:
        """Decode the picture, with its first caption; see `sample`."""
        picture, captions = self.sample()
        return picture, captions[0]

    def sample(self) -> tuple[Image.Image, tuple[str, ...]]:
        """Decode the picture.

        Raises:
            BrokenSample: if the picture cannot be decoded, or it or the caption is missing.
            AfaError: if a column has another type than a picture or text.
        """
        row, recipe = self.row, self.recipe
        name = _name(row, recipe, self.index)
        captions = _captions(row, recipe, name, self.several)
        picture = _value(row, recipe.image_column)
        sample = f"{name} of the data set '{recipe.path}'"
        if not captions:
            raise MissingCaption(
                "AFA-TRAIN-021",
                f"{sample} has no caption in the column '{', '.join(recipe.caption_columns)}'. Add "
                "it, or remove the row.",
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
        return read_picture(picture, name, background=self.background), captions

    def stored(self) -> Stored:
        """The stored form; a missing or wrong picture or caption is empty."""
        picture = _value(self.row, self.recipe.image_column)
        if isinstance(picture, dict):
            picture = picture.get("bytes") or Path(picture.get("path") or "")
        known = picture if isinstance(picture, bytes | Path) else b""
        texts = _texts(self.row, self.recipe, self.several)
        return Stored(known, as_text(tuple(t for t in texts if isinstance(t, str))))


def open_dataset(
    recipe: DatasetRecipe,
    limit: int | None,
    background: Colour = WHITE,
    several: bool = False,
) -> DatasetImages | DatasetStream:
    """Open a data set of the `datasets` library.

    Args:
        recipe: path and names of the columns.
        limit: maximum number of samples; None has no limit.
        background: colour on which transparent pictures are composited.
        several: whether all captions of a picture are used, or the first.

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
    recipe = _with_columns(recipe, list(features))
    if isinstance(features[recipe.image_column.split(".")[0]], ImageFeature):
        # afa decodes the pictures, so that it can skip and name broken ones
        rows = rows.cast_column(recipe.image_column, ImageFeature(decode=False))
    if recipe.streaming:
        return DatasetStream(rows, recipe, limit, files, background, several)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    if len(rows) == 0:
        raise AfaError(
            "AFA-TRAIN-019", f"The data set '{recipe.path}' has no rows; it must have pictures."
        )
    return DatasetImages(rows, recipe, background, several)


def _with_columns(recipe: DatasetRecipe, columns: list[str]) -> DatasetRecipe:
    """Check the columns of a recipe; find those that it does not name by their usual names.

    Raises:
        AfaError: if a column does not exist, or it is not clear which one to use.
    """
    changes = {}
    for key, usual in (("image_column", _PICTURES), ("caption_column", _CAPTIONS)):
        value = getattr(recipe, key)
        named = [value] if isinstance(value, str) else value
        missing = [each.split(".")[0] for each in named if each.split(".")[0] not in columns]
        if not missing:
            continue
        found = [each for each in columns if each in usual]
        if key not in recipe.model_fields_set and len(found) == 1:
            changes[key] = found[0]
            continue
        raise AfaError(
            "AFA-TRAIN-018",
            f"The data set '{recipe.path}' has no column '{missing[0]}'; it has "
            f"{', '.join(columns)}. Set data.dataset.{key} to one of them.",
        )
    return recipe.model_copy(update=changes)


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


def _warnings(features: Any, recipe: DatasetRecipe, several: bool) -> list[str]:
    """A warning if only some captions are used; the features of a stream may be unknown."""
    from datasets import LargeList, List

    columns = recipe.caption_columns
    lists = [
        each for each in columns if isinstance((features or {}).get(each), List | LargeList | list)
    ]
    if several or not (lists or len(columns) > 1):
        return []
    what = f"column '{lists[0]}' has lists of captions" if lists else "recipe names several columns"
    return [
        f"The {what}; only the first caption of each picture is used. To use all of them, set "
        "data.captions: random."
    ]


def _texts(row: Any, recipe: DatasetRecipe, several: bool) -> list[Any]:
    """The captions of a row that are not missing, or the first of them; of any type."""
    found: list[Any] = []
    for column in recipe.caption_columns:
        value = _value(row, column)
        texts = value if isinstance(value, list) else [value]
        found += texts if several else texts[:1]
    found = [text for text in found if text is not None]
    if not several or not all(isinstance(text, str) for text in found):
        return found[:1]
    # an empty text is a caption of its own only if there is no other
    return list(dict.fromkeys(text for text in found if text.strip())) or found[:1]


def _captions(row: Any, recipe: DatasetRecipe, name: str, several: bool) -> tuple[str, ...]:
    """The captions of a row that are used; empty if they are missing.

    Raises:
        AfaError: if a column does not contain text.
    """
    found = _texts(row, recipe, several)
    for text in found:
        if not isinstance(text, str):
            raise AfaError(
                "AFA-TRAIN-020",
                f"{name} of the data set '{recipe.path}' must have text in the column "
                f"'{', '.join(recipe.caption_columns)}'; got {text!r}.",
            )
    return tuple(found)
