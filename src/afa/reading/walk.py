"""The files of a folder of pictures, found in one way wherever pictures are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: what file managers leave beside pictures
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders in order, linked ones included, hidden ones not."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link to a folder above would have no end
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
                yield Path(parent) / name
