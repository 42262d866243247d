"""Folders that one process at a time works in."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from afa.errors import AfaError
from afa.files import LOCK, PARTIAL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Create and lock a folder for this process inside the block.

    Unfinished files of a killed process are removed from it.

    Raises:
        AfaError: if another process has locked it, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AfaError(
            "AFA-FILE-002",
            f"Another process works in '{folder}', which only one may do at a time. Wait for it, "
            "or end it.",
        ) from None
    except (NotImplementedError, OSError) as error:
        # older releases of filelock raise NotImplementedError without flock
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        raise AfaError(
            "AFA-FILE-003",
            f"The file system of '{folder}' has no locks (some network file systems), which a work "
            "folder needs. Pass a folder on another file system.",
        ) from None
    try:
        for partial in folder.rglob(".*.*"):
            if PARTIAL.fullmatch(partial.name) and partial.is_file():
                partial.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def is_owned(folder: Path) -> bool:
    """Whether another process has locked a folder with `owned`; changes nothing in it."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl: Any = import_module("fcntl")  # Windows has none
        # a shared lock that is released at once
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except ImportError:
        try:
            FileLock(folder / LOCK).acquire(timeout=0).lock.release()
        except Timeout:
            return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
