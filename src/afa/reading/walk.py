"""List the files in a folder of pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: files that file managers create
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def files_in(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, sorted, with links but no hidden files."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        resolved = os.path.realpath(parent)
        if resolved in seen:  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
                yield Path(parent) / name
