"""What a run may do that is refused by default; the user says so, never a file.

Permission has two levels. `grant_to_process` is for the command line: all threads and forked
processes have it. `trusting` is for Python: it holds in the current context alone (a thread or an
asyncio task), so that what one thread allows is never allowed to another.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: folders that recipes may name besides their own, as PATH has several
FOLDERS_VARIABLE = "AFA_FOLDERS"


@dataclass(frozen=True)
class Policy:
    """What is allowed.

    Attributes:
        allow_pickle: whether pickled checkpoints are read, as tensors alone.
        offline: whether the hub is left alone, and only its cache is looked into.
        folders: that recipes may name paths in, besides their own folder and the current one.
        rehash: whether files are hashed although their hashes are in the user's cache.
    """

    allow_pickle: bool = False
    offline: bool = False
    folders: tuple[Path, ...] = ()
    rehash: bool = False

    def __or__(self, other: Policy) -> Policy:
        """What either of two allows."""
        return Policy(
            self.allow_pickle or other.allow_pickle,
            self.offline or other.offline,
            tuple(dict.fromkeys((*self.folders, *other.folders))),
            self.rehash or other.rehash,
        )


_own: ContextVar[Policy] = ContextVar("afa_policy")
#: of the process; entries are removed by identity, so overlapping grants may end in any order.
#: Replaced as a whole: readers need no lock, which a fork could inherit locked
_granted: tuple[Policy, ...] = ()
_lock = threading.Lock()


def policy() -> Policy:
    """What is allowed here and now.

    The union of what the process was granted, what the current context allows, and the folders of
    the environment variable `AFA_FOLDERS`.
    """
    allowed = Policy()
    for grant in (*_granted, _own.get(Policy())):
        allowed |= grant
    named = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    return allowed | Policy(folders=tuple(Path(name) for name in named if name))


@contextmanager
def trusting(
    *,
    allow_pickle: bool = False,
    offline: bool = False,
    folders: Sequence[str | Path] = (),
    rehash: bool = False,
) -> Iterator[None]:
    """Allow more while the block runs, in the current thread or asyncio task alone.

    Nested blocks add up. A thread that is started inside the block does not inherit the permission:
    a new thread starts with what the process was granted on the command line. Enter the block in
    that thread, or run the thread's function by `contextvars.copy_context().run`.
    `asyncio.to_thread` does that by itself; forked processes keep the permission of the thread
    that forked them.

    Args:
        allow_pickle: read pickled checkpoints, as tensors alone.
        offline: ask no hub.
        folders: that recipes may name paths in.
        rehash: hash files although their hashes are in the user's cache.

    Raises:
        AfaError: `folders` is one path, not a sequence of paths.
    """
    token = _own.set(_own.get(Policy()) | _policy_of(allow_pickle, offline, folders, rehash))
    try:
        yield
    finally:
        _own.reset(token)


@contextmanager
def grant_to_process(
    *,
    allow_pickle: bool = False,
    offline: bool = False,
    folders: Sequence[str | Path] = (),
    rehash: bool = False,
) -> Iterator[None]:
    """Allow more while the block runs, in all threads of the process; see `trusting`.

    For programs whose user gives the permission to the program as a whole, as the command line.

    Raises:
        AfaError: see `trusting`.
    """
    global _granted
    grant = _policy_of(allow_pickle, offline, folders, rehash)
    with _lock:
        _granted = (*_granted, grant)
    try:
        yield
    finally:
        with _lock:
            _granted = tuple(other for other in _granted if other is not grant)


def require_within(path: str | Path, folder: Path, said_by: str) -> None:
    """Refuse a path that a recipe has no business with.

    A recipe may come from the web; one that names `../../.ssh` is stopped before it is looked at.

    Args:
        path: absolute.
        folder: of the recipe.
        said_by: where it stands, for the error.

    Raises:
        AfaError: it is in none of the folders that the user has named.
    """
    place = Path(os.path.abspath(path))  # links stay: what a user has linked is the user's
    roots = [folder, Path.cwd(), *policy().folders]
    if not any(place.is_relative_to(Path(os.path.abspath(root))) for root in roots):
        raise AfaError(
            "AFA-POLICY-001",
            f"{said_by} may name paths in its own folder and in the current one; '{place}' is in "
            f"neither. If you trust it, say so: --allow-folder '{place.parent}', or in the "
            f"environment variable {FOLDERS_VARIABLE}.",
        )


def _policy_of(
    allow_pickle: bool, offline: bool, folders: Sequence[str | Path], rehash: bool
) -> Policy:
    if isinstance(folders, str | os.PathLike):  # letter by letter "/x" would allow "/"
        raise AfaError(
            "AFA-POLICY-002",
            f"folders is the single path '{folders}'; it must be a sequence of paths. Write "
            f"folders=['{folders}'].",
        )
    places = tuple(Path(folder) for folder in folders)
    return Policy(bool(allow_pickle), bool(offline), places, bool(rehash))
