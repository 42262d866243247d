"""What was converted while pictures were read: counted, and said once."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


class Conversion(StrEnum):
    """Something that was done to a picture, or could not be done, on its way to 8-bit sRGB."""

    DEPTH = "depth"
    ALPHA = "alpha"
    PROFILE = "profile"
    BAD_PROFILE = "bad profile"
    STATED_COLOURS = "stated colours"
    CMYK = "cmyk"
    FRAMES = "frames"
    METADATA = "metadata"
    ENLARGED = "enlarged"

    @property
    def said(self) -> str:
        """What there is to say of some pictures, after their number."""
        return _SAID[self]


_SAID = {
    Conversion.DEPTH: "with more than 8 bits scaled to 8 bits",
    Conversion.ALPHA: "transparent, composited on the background colour",
    Conversion.PROFILE: "converted from the embedded colour profile to sRGB",
    Conversion.BAD_PROFILE: "with a colour profile that is damaged or of another colour model, "
    "read as sRGB without it",
    Conversion.STATED_COLOURS: "that state other colours without a profile (gamma in a PNG, Adobe "
    "RGB in EXIF), read as sRGB",
    Conversion.CMYK: "of CMYK without a profile, converted by formula, so colours are approximate",
    Conversion.FRAMES: "with several frames or pages, of which the first is read",
    Conversion.METADATA: "with damaged metadata, whose orientation may be missed",
    Conversion.ENLARGED: "smaller than the resolution and enlarged to it",
}


class Tally:
    """Counts converted pictures, each once however often it is read."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        #: the number of pictures of each conversion
        self.counts: Counter[Conversion] = Counter()

    def add(self, picture: Hashable, conversions: Iterable[Conversion]) -> list[Conversion]:
        """Note what was done to a picture.

        Args:
            picture: its number or name.
            conversions: what was done.

        Returns: those that no picture had before.
        """
        found = frozenset(conversions)
        if not found or picture in self._seen:
            return []
        new = found - self.counts.keys()
        self._seen.add(picture)
        self.counts.update(found)
        return sorted(new)

    def line(self, what: str = "Pictures") -> str | None:
        """All of it on one line; None where nothing was converted."""
        if not self.counts:
            return None
        counts = self.counts
        listed = "; ".join(f"{counts[each]} {each.said}" for each in Conversion if counts[each])
        return f"{what} converted while reading: {listed}."


def counted(count: int, noun: str) -> str:
    """A number of things in words: "1 file", "2 files"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
