"""Interfaces of data sets of captioned pictures."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image


class CaptionedImages(Protocol):
    """A data set of pictures and captions, by index.

    Reading a broken picture or a picture without a caption raises `afa.reading.BrokenSample`. If a
    picture has several captions, an index gives the first, and `sample_of` gives all.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, str]: ...

    def stored(self, index: int) -> Stored:
        """The sample in its stored form; its picture is not decoded."""

    def name(self, index: int) -> str:
        """The name of a sample for messages: its file, or its row."""

    @property
    def fingerprint(self) -> str:
        """A string that changes if the pictures or captions change."""


class Stored(NamedTuple):
    """The stored form of a sample.

    Attributes:
        picture: its file, or the bytes that determine it.
        caption: its text, or one text for several captions; empty if it is missing.
    """

    picture: Path | bytes
    caption: str


class SampleReader(Protocol):
    """A sample of a stream that is not decoded yet."""

    def __call__(self) -> tuple[Image.Image, str]:
        """The picture and its caption."""

    def sample(self) -> tuple[Image.Image, tuple[str, ...]]:
        """The picture and all its captions."""

    def stored(self) -> Stored:
        """See `CaptionedImages.stored`."""


class StreamedImages(ABC):
    """A data set that can only be read from its beginning."""

    @abstractmethod
    def __iter__(self) -> Iterator[SampleReader]:
        """Readers of all samples in order, so that samples can be skipped without decoding."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes if the pictures or captions change."""


class Part:
    """A subset of a data set."""

    def __init__(self, data: CaptionedImages, indices: range) -> None:
        self._data, self._indices = data, indices

    def __repr__(self) -> str:
        return f"Part({self._data!r}, {self._indices})"

    @property
    def whole(self) -> CaptionedImages:
        """The data set of which this is a part."""
        return self._data

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self._data[self._indices[index]]

    def sample(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See `sample_of`."""
        return sample_of(self._data, self._indices[index])

    def stored(self, index: int) -> Stored:
        """See `CaptionedImages.stored`."""
        return self._data.stored(self._indices[index])

    def repeats(self, index: int) -> int:
        """See `repeats_of`."""
        return repeats_of(self._data, self._indices[index])

    def captions(self) -> Iterator[tuple[str, ...]] | None:
        """See `captions_in`."""
        found = captions_in(self._data)
        if found is None:
            return None
        return itertools.islice(found, self._indices.start, self._indices.stop, self._indices.step)

    def name(self, index: int) -> str:
        """See `CaptionedImages.name`."""
        return self._data.name(self._indices[index])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the whole, with the indices."""
        return f"{self._data.fingerprint}[{self._indices}]"


class Joined:
    """Several data sets, one after the other."""

    def __init__(self, *parts: CaptionedImages) -> None:
        flat: list[CaptionedImages] = []
        for part in parts:
            flat += part.parts if isinstance(part, Joined) else [part]
        self._parts = tuple(flat)
        self._ends = list(itertools.accumulate(len(part) for part in flat))

    def __repr__(self) -> str:
        return f"Joined({', '.join(map(repr, self._parts))})"

    def _at(self, index: int) -> tuple[CaptionedImages, int]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        part, place = self._at(index)
        return part[place]

    def sample(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See `sample_of`."""
        part, place = self._at(index)
        return sample_of(part, place)

    def stored(self, index: int) -> Stored:
        """See `CaptionedImages.stored`."""
        part, place = self._at(index)
        return part.stored(place)

    def repeats(self, index: int) -> int:
        """See `repeats_of`."""
        part, place = self._at(index)
        return repeats_of(part, place)

    @property
    def parts(self) -> tuple[CaptionedImages, ...]:
        """The data sets."""
        return self._parts

    @property
    def warnings(self) -> list[str]:
        """The warnings of all parts."""
        return [line for part in self._parts for line in getattr(whole_of(part), "warnings", ())]

    @property
    def unused(self) -> list[Path]:
        """Files in the folders of the parts that are not used."""
        return [file for part in self._parts for file in getattr(whole_of(part), "unused", ())]

    @property
    def source(self) -> str:
        """See `source_of`."""
        return " and ".join(source_of(part) for part in self._parts)

    def captions(self) -> Iterator[tuple[str, ...]] | None:
        """See `captions_in`."""
        found = [captions_in(part) for part in self._parts]
        known = [each for each in found if each is not None]
        return itertools.chain(*known) if len(known) == len(found) else None

    def name(self, index: int) -> str:
        """See `CaptionedImages.name`."""
        part, place = self._at(index)
        return part.name(place)

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all parts."""
        return " and ".join(part.fingerprint for part in self._parts)


def whole_of(data: CaptionedImages | StreamedImages) -> CaptionedImages | StreamedImages:
    """The data set without the limit of `data.limit`."""
    while isinstance(data, Part):
        data = data.whole
    return data


def sample_of(data: CaptionedImages, index: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Read a picture and all its captions; data sets without several give the only one.

    Raises:
        BrokenSample: if the picture is broken, or has no caption.
    """
    read = getattr(data, "sample", None)
    if read is not None:
        return read(index)
    picture, caption = data[index]
    return picture, (caption,)


def repeats_of(data: CaptionedImages, index: int) -> int:
    """Return how often a sample is used, relative to the others."""
    repeats = getattr(data, "repeats", None)
    return 1 if repeats is None else repeats(index)


def repeated(data: CaptionedImages, samples: Sequence[int]) -> Sequence[int]:
    """Return samples with each as often as it is used; the same object if all are used once."""
    repeats = [repeats_of(data, sample) for sample in samples]
    if all(count == 1 for count in repeats):
        return samples
    pairs = zip(samples, repeats, strict=True)
    return [sample for sample, count in pairs for _ in range(count)]


def source_of(data: CaptionedImages | StreamedImages) -> str:
    """Return where the pictures come from, for the user."""
    whole = whole_of(data)
    return getattr(whole, "source", repr(whole))


def captions_in(data: CaptionedImages | StreamedImages) -> Iterator[tuple[str, ...]] | None:
    """All captions of each sample in order, without reading pictures; empty for missing ones.

    Returns None for data sets that have to read pictures for it, such as streams.
    """
    captions = getattr(data, "captions", None)
    return None if captions is None else captions()
