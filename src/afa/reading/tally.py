"""Count the conversions of pictures that were read, to report them once."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


class Conversion(StrEnum):
    """A conversion of a picture to 8-bit sRGB, or a problem with it."""

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
        """A description that follows the number of pictures."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Conversion.DEPTH: "with more than 8 bits scaled to 8 bits",
    Conversion.ALPHA: "transparent, composited on the background colour",
    Conversion.PROFILE: "converted from the embedded colour profile to sRGB",
    Conversion.BAD_PROFILE: "with a colour profile that is damaged or for another colour model, "
    "ignored and read as sRGB",
    Conversion.STATED_COLOURS: "with metadata of another colour space without a profile (gamma in "
    "a PNG, Adobe RGB in EXIF), read as sRGB",
    Conversion.CMYK: "in CMYK without a profile, converted by formula with approximate colours",
    Conversion.FRAMES: "with several frames or pages, of which the first is read",
    Conversion.METADATA: "with damaged metadata, possibly with a wrong orientation",
    Conversion.ENLARGED: "smaller than the resolution, enlarged to it",
}


class Tally:
    """Counts converted pictures, each once even if it is read several times."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        #: the number of pictures of each conversion
        self.counts: Counter[Conversion] = Counter()

    def add(self, picture: Hashable, conversions: Iterable[Conversion]) -> list[Conversion]:
        """Count the conversions of a picture.

        Args:
            picture: its number or name.

        Returns: the conversions that no earlier picture had.
        """
        found = frozenset(conversions)
        if not found or picture in self._seen:
            return []
        new = found - self.counts.keys()
        self._seen.add(picture)
        self.counts.update(found)
        return sorted(new)

    def lines(self) -> list[str]:
        """The result of `line` in a list, which is empty without any conversions."""
        line = self.line()
        return [] if line is None else [line]

    def line(self, what: str = "Pictures") -> str | None:
        """Describe all conversions on one line; None without any."""
        if not self.counts:
            return None
        counts = self.counts
        listed = "; ".join(f"{counts[each]} {each.said}" for each in Conversion if counts[each])
        return f"{what} converted while reading: {listed}."


def counted(count: int, noun: str) -> str:
    """Format a number with a noun: "1 file", "2 files"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
