"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import marshal
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LOCK = ".lock"
#: bytes and levels of a JSON file; the largest that is read is a results page of a study
MAX_JSON, MAX_DEPTH = 32_000_000, 64
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_IRREGULAR = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
#: nanoseconds after which another write is sure to change a file's times; FAT has 2 s
SETTLED = 2_000_000_000
#: bytes that a `FileCache` holds
_MAX_CACHED = 64_000_000
_PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `write_atomic` names what it has not finished


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have a folder's names on the disk; where a system has no such thing it does by itself."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder() -> Path:
    """Where shipped models and configurations are written out: `$XDG_CACHE_HOME/afa`.

    By default `~/.cache/afa`; safe to delete at any time.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afa"


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A free path beside `output` for a new file or folder, which becomes `output` at the end.

    Whatever goes wrong, nothing is left of it, nor of parent folders that were made for it. What a
    killed process has left beside `output` is removed by the next one that makes it.
    """
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    workplace = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    lock = FileLock(workplace / LOCK)
    try:
        lock.acquire(timeout=0)
        partial = workplace / output.name
        yield partial
        os.replace(partial, output)
    except BaseException:
        lock.release()
        shutil.rmtree(workplace, ignore_errors=True)
        with suppress(OSError):  # someone else may use them by now
            for parent in made:
                parent.rmdir()
        raise
    lock.release()
    shutil.rmtree(workplace, ignore_errors=True)
    _sync(output.parent)


def _remove_abandoned(output: Path) -> None:
    """Remove the workplaces of processes that are no more, which have let go of their locks."""
    for workplace in output.parent.glob(f"{glob.escape(f'.{output.name}.')}*"):
        lock_file = workplace / LOCK
        if not (_PARTIAL.fullmatch(workplace.name) and lock_file.is_file()):
            continue
        lock = FileLock(lock_file)
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            lock.release()
            shutil.rmtree(workplace, ignore_errors=True)


def require_place_for_folder(folder: Path, what: str) -> None:
    """Refuse a place where no folder can be, without making one.

    Args:
        folder: that is to be written.
        what: it is for, with an article, for the error.

    Raises:
        AfaError: names what is in the way.
    """
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise AfaError(
            "AFA-FILE-001",
            f"{what} '{folder}' must be a folder that can be written; '{above}' is none. Name "
            "another one, or change its permissions.",
        )


def is_unicode(text: str) -> bool:
    """Whether a text can be written; halves of characters, which JSON may hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keep a folder for this process while the block runs; the folder is made if it is missing.

    Files that a killed process had not finished are removed from it.

    Raises:
        AfaError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AfaError(
            "AFA-FILE-002",
            f"Only one process at a time may work in '{folder}', and another one does. Wait for "
            "it, or end it.",
        ) from None
    except (NotImplementedError, OSError) as error:
        # the first is how older releases of filelock say that there is no flock at all
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        raise AfaError(
            "AFA-FILE-003",
            f"A work folder must be on a file system with locks; that of '{folder}' has none "
            "(some network file systems). Name a folder on another one.",
        ) from None
    try:
        for partial in folder.rglob(".*.*"):
            if _PARTIAL.fullmatch(partial.name) and partial.is_file():
                partial.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, or holds nothing but what an unfinished start left in it."""
    return not folder.exists() or (
        folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
    )


def parts_of(index: Mapping[str, Any]) -> dict[str, str]:
    """The parts that a `model_index.json` names, and their classes; empty places are left out.

    A name is no path: `../x` would be read from outside the folder.
    """
    return {
        name: entry[1]
        for name, entry in index.items()
        if name.isidentifier()
        and isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(part, str) for part in entry)
    }


def irregular(path: Path) -> str | None:
    """What a path is that is no regular file, links followed, such as "a named pipe".

    Reading a pipe, a socket or a device may never end. None for a regular file, and where nothing
    is: reading it says so.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # no name of a file has a zero byte
        return None
    if stat.S_ISREG(mode):
        return None
    return _IRREGULAR.get(stat.S_IFMT(mode), "no regular file")


class Mark(NamedTuple):
    """What tells that a file is the same and was not written into: `os.stat`, links followed."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_settled(self) -> bool:
        """Whether any write from now on changes the mark; it may not in a file just written."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > SETTLED


def mark_of(file: Path) -> Mark | None:
    """The mark of a file as it is now; None where there is none."""
    try:
        found = file.stat()
    except (OSError, ValueError):  # no name of a file has a zero byte
        return None
    return Mark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileCache:
    """What was read from files, in this process, each until its file changes.

    Contents are plain values as of JSON. Every caller gets its own copy.
    """

    def __init__(self) -> None:
        # no lock, which a fork could inherit locked: each access is atomic, and the size may be
        # wrong by what threads keep at once
        self._kept: dict[str, tuple[Mark, bytes]] = {}
        self._size = 0

    def get(self, file: Path, read: Callable[[], Any]) -> Any:
        """The content of a file: what was kept, or what `read` returns."""
        place, mark = os.path.abspath(file), mark_of(file)
        known = self._kept.get(place)
        if known is not None and known[0] == mark:
            return marshal.loads(known[1])
        is_settled = mark is not None and mark.is_settled  # before it is read
        content = read()
        if mark is not None and is_settled and mark_of(file) == mark:
            self._keep(place, mark, marshal.dumps(content))
        return content

    def _keep(self, place: str, mark: Mark, content: bytes) -> None:
        before = self._kept.pop(place, None)
        self._kept[place] = mark, content
        self._size += len(content) - (len(before[1]) if before is not None else 0)
        while self._size > _MAX_CACHED and self._kept:
            for oldest in list(self._kept)[:100]:
                _, dropped = self._kept.pop(oldest, (mark, b""))
                self._size -= len(dropped)


_json = FileCache()


def require_readable(path: Path, limit: int) -> None:
    """Refuse what is no regular file, which reading might never end, or is too large.

    Raises:
        OSError: there is none.
        ValueError: says what it is.
    """
    size = path.stat().st_size
    if (what := irregular(path)) is not None:
        raise ValueError(f"it is {what} and must be a regular file")
    if size > limit:
        raise ValueError(f"it has {size} bytes, {limit} are the most")


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a regular file that is not larger than it should be; no byte order mark.

    Args:
        path: of no pipe or device, which reading might never end.
        limit: bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, too large, or no UTF-8.
    """
    require_readable(path, limit)
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise ValueError("it has zero bytes, as UTF-16 has; save it as UTF-8")
    return text


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object from a file, once for each state of it.

    Args:
        path: of a regular file.
        limit: bytes that it may have.

    Raises:
        AfaError: the file cannot be read, is too large or too deep, or holds something else.
    """
    try:
        require_readable(path, limit)
        content = _json.get(path, lambda: _parse(read_text(path, limit)))
    except (OSError, ValueError, RecursionError) as error:
        raise AfaError(
            "AFA-FILE-004", f"'{path}' must be JSON, but reading it says: {error}."
        ) from error
    if not isinstance(content, dict):
        raise AfaError(
            "AFA-FILE-005", f"'{path}' must hold a JSON object, came {str(content)[:80]}."
        )
    return content


def _parse(text: str) -> Any:
    content = json.loads(text)
    if depth_of(content) > MAX_DEPTH:
        raise ValueError(f"it is deeper than {MAX_DEPTH} levels")
    return content


def depth_of(content: Any) -> int:
    """How deep lists and objects lie in one another; a number or a text has depth 0."""
    depth, level = 0, [content]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ] or ([None] if any(isinstance(outer, dict | list) for outer in level) else []):
        depth += 1
    return depth


def slug(text: str) -> str:
    """A text as part of a file's name: lower case, letters and digits, 48 at the most."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "prompt"
