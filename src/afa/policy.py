"""Permissions for actions that are refused by default; only the user can give them, never a file.

There are two scopes. `grant_to_process` is for the command line and applies to all threads and
forked processes. `trusting` is for Python and applies only to the current context (a thread or an
asyncio task), so that no thread gets the permissions of another. Spawned processes get neither;
workers that read pictures, which are spawned on Windows and macOS, need none.
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

#: folders that recipes may access besides their own, separated as in PATH
FOLDERS_VARIABLE = "AFA_FOLDERS"


@dataclass(frozen=True)
class Policy:
    """A set of permissions and settings.

    Attributes:
        allow_pickle: whether pickled checkpoints may be read, only tensors.
        offline: whether only the hub's cache is used, without network access.
        folders: that recipes may access, besides their own folder and the current one.
        rehash: whether files are hashed even if their hashes are cached.
    """

    allow_pickle: bool = False
    offline: bool = False
    folders: tuple[Path, ...] = ()
    rehash: bool = False

    def __or__(self, other: Policy) -> Policy:
        """Return everything that one of two policies allows."""
        return Policy(
            self.allow_pickle or other.allow_pickle,
            self.offline or other.offline,
            tuple(dict.fromkeys((*self.folders, *other.folders))),
            self.rehash or other.rehash,
        )


_own: ContextVar[Policy] = ContextVar("afa_policy")
#: of the process; entries are removed by identity, so overlapping grants may end in any order.
#: The tuple is replaced, so that readers need no lock, which a fork could inherit locked
_granted: tuple[Policy, ...] = ()
_lock = threading.Lock()


def policy() -> Policy:
    """Return the current policy.

    It is the union of the process's permissions, those of the current context, and the folders in
    the environment variable `AFA_FOLDERS`.
    """
    allowed = Policy()
    for grant in (*_granted, _own.get(Policy())):
        allowed |= grant
    folders = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    return allowed | Policy(folders=tuple(Path(name) for name in folders if name))


@contextmanager
def trusting(
    *,
    allow_pickle: bool = False,
    offline: bool = False,
    folders: Sequence[str | Path] = (),
    rehash: bool = False,
) -> Iterator[None]:
    """Add permissions inside the block, only in the current thread or asyncio task.

    Nested blocks are combined. A thread that is started inside the block does not inherit the
    permissions; it has only those from the command line. Enter the block in that thread, or run the
    thread's function with `contextvars.copy_context().run`, as `asyncio.to_thread` does. Forked
    processes inherit the permissions of the thread that forked them.

    Args:
        allow_pickle: read pickled checkpoints, only tensors.
        offline: use only the hub's cache, without network access.
        folders: that recipes may access.
        rehash: hash files even if their hashes are cached.

    Raises:
        AfaError: if `folders` is one path instead of a sequence of paths.
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
    """Add permissions inside the block, in all threads of the process; see `trusting`.

    For programs whose user gives permissions to the whole program, such as the command line.

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
    """Check that a recipe may access a path.

    A recipe may come from the web, so a path such as `../../.ssh` is refused before it is read.

    Args:
        path: absolute.
        said_by: the source of the path, for the error.

    Raises:
        AfaError: if it is in none of the allowed folders.
    """
    absolute = Path(os.path.abspath(path))  # does not resolve links, which the user created
    roots = [folder, Path.cwd(), *policy().folders]
    if not any(absolute.is_relative_to(Path(os.path.abspath(root))) for root in roots):
        raise AfaError(
            "AFA-POLICY-001",
            f"{said_by} names '{absolute}'; it may only access its own folder and the current one. "
            f"If you trust it, pass --allow-folder '{absolute.parent}', or set the environment "
            f"variable {FOLDERS_VARIABLE}.",
        )


def _policy_of(
    allow_pickle: bool, offline: bool, folders: Sequence[str | Path], rehash: bool
) -> Policy:
    if isinstance(folders, str | os.PathLike):  # its letters would be folders, such as "/"
        raise AfaError(
            "AFA-POLICY-002",
            f"folders is the single path '{folders}'; it must be a sequence of paths. Pass "
            f"folders=['{folders}'].",
        )
    paths = tuple(Path(folder) for folder in folders)
    return Policy(bool(allow_pickle), bool(offline), paths, bool(rehash))
