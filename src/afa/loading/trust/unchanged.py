"""Files of weights that are in use must stay as they are.

Weights are mapped into memory: who writes into an expert's file while it is in use changes the
model that runs. A file that is replaced as a whole, as downloads and most programs do, leaves the
one in use alone, and is told by its hash when it is loaded next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: of a file: which one it is, and what writing into it changes
Mark = tuple[tuple[int, int], tuple[int, int]]

_marks: Any = WeakKeyDictionary()


def marks_of(files: Iterable[Path]) -> dict[Path, Mark]:
    """What files are like now; those that are not there are left out."""
    found = {file: _mark(file) for file in files}
    return {file: mark for file, mark in found.items() if mark is not None}


def watch(pipeline: Any, marks: dict[Path, Mark]) -> None:
    """Keep what the files of a pipeline were like before they were read."""
    _marks[denoiser_of(pipeline)] = marks


def require_unchanged(pipeline: Any) -> None:
    """Refuse to keep what a pipeline has made of files that somebody wrote into.

    Raises:
        AfaError: names the first such file.
    """
    for file, before in _marks.get(denoiser_of(pipeline), {}).items():
        now = _mark(file)
        if now is not None and now[0] == before[0] and now[1] != before[1]:
            raise AfaError(
                f"Files of weights must stay as they are while they are in use; '{file}' was "
                "written into. What came after that is not kept. Restore the file, and run the "
                "same command again."
            )


def _mark(file: Path) -> Mark | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
