"""Rows of a data set: pictures with their captions, and how captions are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SHOWN = 3  # names in a warning


@dataclass(frozen=True)
class CaptionOptions:
    """How the captions of pictures are read.

    Attributes:
        several: whether all captions of a picture are kept, instead of the first.
        columns: columns of captions in a list; empty finds one by its name.
        file_column: column of the pictures' paths in a list; None finds it by its name.
        from_folders: whether a picture without a caption has the name of its folder as caption:
            "sks dog" in kohya's `10_sks dog`.
        repeats: whether the numbers in the names of kohya's folders are honoured.
    """

    several: bool = False
    columns: tuple[str, ...] = ()
    file_column: str | None = None
    from_folders: bool = False
    repeats: bool = False


class Row(NamedTuple):
    """A picture and its captions.

    Attributes:
        path: of the picture.
        captions: its captions; empty if it has none.
        repeats: how often it is used, relative to the others.
    """

    path: Path
    captions: tuple[str, ...]
    repeats: int = 1


class Rows(NamedTuple):
    """The contents of a folder, an archive or a list.

    Attributes:
        rows: pictures and captions.
        unused: all other files except hidden ones.
        warnings: warnings for the user, one line each.
        remedy: advice for broken rows.
        source: what was read, for the user.
    """

    rows: list[Row]
    unused: list[Path]
    warnings: list[str]
    remedy: str
    source: str


def kept(captions: list[str], options: CaptionOptions) -> tuple[str, ...]:
    """Return the captions of a picture that are used: all different ones, or the first."""
    return tuple(dict.fromkeys(captions) if options.several else captions[:1])


def as_text(captions: tuple[str, ...]) -> str:
    """Return one text for all captions of a picture, from which they can be told apart."""
    if len(captions) < 2:
        return captions[0] if captions else ""
    return "\x1e" + json.dumps(captions)


def some(files: list[Path], folder: Path) -> str:
    """Return the first names of files in a folder, for a message."""
    shown = ", ".join(relative(path, folder) for path in files[:_SHOWN])
    return f"{shown}, ..." if len(files) > _SHOWN else shown


def relative(path: Path, folder: Path) -> str:
    """Return a path within a folder, or the complete path if it is elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
