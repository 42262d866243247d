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
from afa.files import mark_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from afa.files import Mark

_marks: Any = WeakKeyDictionary()


def marks_of(files: Iterable[Path]) -> dict[Path, Mark]:
    """What files are like now; those that are not there are left out."""
    found = {file: mark_of(file) for file in files}
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
        now = mark_of(file)
        # its times may change without a write, as of a file that gets a second name
        if now is not None and now[:2] == before[:2] and now[2:4] != before[2:4]:
            raise AfaError(
                "AFA-LOAD-100",
                f"Files of weights must stay as they are while they are in use; '{file}' was "
                "written into. What came after that is not kept. Restore the file, and run the "
                "same command again.",
            )
