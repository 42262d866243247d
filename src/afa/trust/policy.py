"""What a run may do that is refused by default; the user says so, never a file."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: folders that recipes may name besides their own, as PATH has several
FOLDERS_VARIABLE = "AFA_FOLDERS"


@dataclass(frozen=True)
class Policy:
    """What is allowed.

    Attributes:
        allow_pickle: whether pickled checkpoints are read, as tensors alone.
        offline: whether the hub is left alone, and only its cache is looked into.
        folders: that recipes may name paths in, besides their own folder and the current one.
    """

    allow_pickle: bool = False
    offline: bool = False
    folders: tuple[Path, ...] = ()


_current = Policy()


def policy() -> Policy:
    """What is allowed now; folders of the environment variable `AFA_FOLDERS` are."""
    named = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    return replace(_current, folders=(*_current.folders, *(Path(name) for name in named if name)))


@contextmanager
def trusting(**changes: Any) -> Iterator[None]:
    """Allow more while the block runs, in the whole process.

    Args:
        changes: of `Policy`, by name; what is None, False or empty leaves it as it is.
    """
    global _current
    before = _current
    _current = replace(before, **{key: value for key, value in changes.items() if value})
    try:
        yield
    finally:
        _current = before
