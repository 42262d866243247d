"""Captioned pictures: what a data set is."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image


class CaptionedImages(Protocol):
    """A data set of pictures and captions, by index.

    Reading a broken picture, or one without a caption, raises `afa.reading.BrokenSample`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, str]: ...

    def stored(self, index: int) -> Stored:
        """The sample as it is kept, without decoding its picture."""

    def name(self, index: int) -> str:
        """What a person would look for: a file, or a row of a data set."""

    @property
    def fingerprint(self) -> str:
        """Differs where the pictures or captions do."""


class Stored(NamedTuple):
    """A sample as a data set keeps it.

    Attributes:
        picture: its file, or the bytes that decide it.
        caption: its text; empty where it has none.
    """

    picture: Path | bytes
    caption: str


class SampleReader(Protocol):
    """A sample of a stream that is not decoded yet."""

    def __call__(self) -> tuple[Image.Image, str]:
        """The picture and its caption."""

    def stored(self) -> Stored:
        """See `CaptionedImages.stored`."""


class StreamedImages(ABC):
    """A data set that can only be read from its beginning.

    It gives readers, since not everyone who counts the samples wants to decode them.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[SampleReader]:
        """All samples in order, none of them read yet."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Differs where the pictures or captions do."""


class Part:
    """Some samples of a data set, as a data set."""

    def __init__(self, data: CaptionedImages, indices: range) -> None:
        self._data, self._indices = data, indices

    def __repr__(self) -> str:
        return f"Part({self._data!r}, {self._indices})"

    @property
    def whole(self) -> CaptionedImages:
        """The data set that these samples are of."""
        return self._data

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self._data[self._indices[index]]

    def stored(self, index: int) -> Stored:
        """The whole's."""
        return self._data.stored(self._indices[index])

    def captions(self) -> Iterator[str | None] | None:
        """See `captions_in`."""
        found = captions_in(self._data)
        if found is None:
            return None
        return itertools.islice(found, self._indices.start, self._indices.stop, self._indices.step)

    def name(self, index: int) -> str:
        """The name that the whole has for it."""
        return self._data.name(self._indices[index])

    @property
    def fingerprint(self) -> str:
        """The whole's, and which part."""
        return f"{self._data.fingerprint}[{self._indices}]"


def captions_in(data: CaptionedImages | StreamedImages) -> Iterator[str | None] | None:
    """All captions of a data set in order, None where one is missing, without reading a picture.

    Returns None for data sets that cannot do so: streams, and those that are made on the fly.
    """
    captions = getattr(data, "captions", None)
    return None if captions is None else captions()
