"""Detect writes to weight files that are in use.

Weights are memory-mapped: writing into an expert's file while it is in use changes the running
model. Replacing a file, as downloads and most programs do, does not affect the mapped one; its hash
is checked when it is loaded again.
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
    """Return the current marks of the files that exist; see `afa.files.Mark`."""
    found = {file: mark_of(file) for file in files}
    return {file: mark for file, mark in found.items() if mark is not None}


def watch(pipeline: Any, marks: dict[Path, Mark]) -> None:
    """Store the marks that a pipeline's files had before they were read."""
    _marks[denoiser_of(pipeline)] = marks


def watch_as(pipeline: Any, other: Any) -> None:
    """Watch the files of another pipeline, with whose parts this one was built."""
    marks = _marks.get(denoiser_of(other), {})
    _marks[denoiser_of(pipeline)] = {**marks, **_marks.get(denoiser_of(pipeline), {})}


def require_unchanged(pipeline: Any) -> None:
    """Check that a pipeline's files were not written since they were read.

    Raises:
        AfaError: if one was; its results must not be saved.
    """
    for file, before in _marks.get(denoiser_of(pipeline), {}).items():
        now = mark_of(file)
        # ctime alone may change without a write, such as by a new hard link
        if now is not None and now[:2] == before[:2] and now[2:4] != before[2:4]:
            raise AfaError(
                "AFA-LOAD-100",
                f"'{file}' was written to while it was in use; weight files must not change. "
                "Results since then are not saved. Restore the file, and run the same command "
                "again.",
            )
