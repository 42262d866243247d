"""Atomic file writes, and cached reads of small files."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

LOCK = ".lock"
#: limits of a JSON file in bytes and levels; the largest are the results of a study
MAX_JSON, MAX_DEPTH = 32_000_000, 64
_IRREGULAR = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
#: nanoseconds after which any write changes a file's times; FAT has a resolution of 2 s
SETTLED = 2_000_000_000
#: names of unfinished files and folders
PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically: it is either complete or absent, even after a power failure."""
    with replaced(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_png(path: Path, picture: Image.Image, info: PngInfo | None = None) -> None:
    """Write a picture as PNG, with texts if given; atomically."""
    with replaced(path) as file:
        picture.save(file, format="PNG", pnginfo=info)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Provide a stream whose content becomes the file `path` at the end, as in `write_atomic`."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, on systems that support it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder() -> Path:
    """Return the user's cache folder, `$XDG_CACHE_HOME/afa` or `~/.cache/afa`.

    It can be deleted at any time.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afa"


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Provide a temporary path for a new file or folder, which is renamed to `output` at the end.

    If an exception is raised, it is removed together with new parent folders. Remains of a killed
    process are removed by the next one that writes `output`.
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
        put_in_place(partial, output)
    except BaseException:
        lock.release()
        shutil.rmtree(workplace, ignore_errors=True)
        with suppress(OSError):  # others may use them now
            for parent in made:
                parent.rmdir()
        raise
    lock.release()
    shutil.rmtree(workplace, ignore_errors=True)
    _sync(output.parent)


def put_in_place(partial: Path, output: Path) -> None:
    """Rename a finished file or folder; it replaces a file, or an empty folder."""
    try:
        os.replace(partial, output)
    except OSError:
        if not (partial.is_dir() and output.is_dir()):
            raise
        output.rmdir()  # Windows replaces no folder; fails if it is not empty
        os.replace(partial, output)


def _remove_abandoned(output: Path) -> None:
    """Remove temporary folders of processes that have ended, which released their locks."""
    for workplace in output.parent.glob(f"{glob.escape(f'.{output.name}.')}*"):
        lock_file = workplace / LOCK
        if not (PARTIAL.fullmatch(workplace.name) and lock_file.is_file()):
            continue
        lock = FileLock(lock_file)
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            lock.release()
            shutil.rmtree(workplace, ignore_errors=True)


def require_place_for_folder(folder: Path, what: str) -> None:
    """Check that a folder can be written, without creating it.

    Args:
        what: its purpose, with an article, for the error.

    Raises:
        AfaError: if it cannot; names the file or folder that prevents it.
    """
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise AfaError(
            "AFA-FILE-001",
            f"{what} '{folder}' cannot be written, since '{above}' is not a writable folder. Pass "
            "another folder, or change the permissions.",
        )


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; lone surrogates, which JSON may contain, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, or contains only hidden files of an unfinished start."""
    return not folder.exists() or (
        folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
    )


def parts_of(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the components in a `model_index.json` and their classes, without empty ones.

    Names that are paths are ignored: `../x` would be outside the folder.
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
    """Describe a path that is not a regular file, such as "a named pipe", with links followed.

    Reading a pipe, a socket or a device may never end. None for a regular file, and for a missing
    one, which raises an error when it is read.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    if stat.S_ISREG(mode):
        return None
    return _IRREGULAR.get(stat.S_IFMT(mode), "not a regular file")


class Mark(NamedTuple):
    """Identity and state of a file, to detect writes: from `os.stat`, with links followed."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_settled(self) -> bool:
        """Whether any later write changes the mark; it may not soon after the last write."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > SETTLED


def mark_of(file: Path) -> Mark | None:
    """Return the current mark of a file; None if it does not exist."""
    try:
        found = file.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return Mark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileCache:
    """Cache of file contents in this process, each valid until its file changes.

    Contents are JSON-like values. Every caller gets its own copy.

    Args:
        max_bytes: of all contents; the oldest are dropped.
    """

    def __init__(self, max_bytes: int = 64_000_000) -> None:
        # no lock, which a fork could inherit locked: each access is atomic, and concurrent threads
        # can only make the size inexact
        self._kept: dict[str, tuple[Mark, bytes]] = {}
        self._size, self._max_bytes = 0, max_bytes

    def get(self, file: Path, read: Callable[[], Any]) -> Any:
        """Return the cached content of a file, or the result of `read`."""
        path, mark = os.path.abspath(file), mark_of(file)
        known = self._kept.get(path)
        if known is not None and known[0] == mark:
            return marshal.loads(known[1])
        is_settled = mark is not None and mark.is_settled  # before it is read
        content = read()
        if mark is not None and is_settled and mark_of(file) == mark:
            self._keep(path, mark, marshal.dumps(content))
        return content

    def _keep(self, path: str, mark: Mark, content: bytes) -> None:
        before = self._kept.pop(path, None)
        self._kept[path] = mark, content
        self._size += len(content) - (len(before[1]) if before is not None else 0)
        while self._size > self._max_bytes and self._kept:
            for oldest in list(self._kept)[:100]:
                _, dropped = self._kept.pop(oldest, (mark, b""))
                self._size -= len(dropped)


json_cache = FileCache()


def require_readable(path: Path, limit: int) -> None:
    """Check that a path is a regular file of at most `limit` bytes.

    Raises:
        OSError: if it does not exist.
        ValueError: if it is too large or not a regular file, which may be endless.
    """
    size = path.stat().st_size
    if (what := irregular(path)) is not None:
        raise ValueError(f"it is {what} and must be a regular file")
    if size > limit:
        raise ValueError(f"it has {size} bytes, the maximum is {limit}")


def read_text(path: Path, limit: int) -> str:
    """Read a UTF-8 text file of at most `limit` bytes, without byte order mark.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is too large, not a regular file, or not UTF-8.
    """
    require_readable(path, limit)
    return require_text(path.read_text(encoding="utf-8-sig"))


def require_text(text: str) -> str:
    """Return a text without zero bytes.

    Raises:
        ValueError: if it has any.
    """
    if "\0" in text:
        raise ValueError("it contains zero bytes and may be UTF-16; save it as UTF-8")
    return text


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object from a file; it is cached until the file changes.

    Args:
        limit: maximum bytes.

    Raises:
        AfaError: if the file cannot be read, is too large or too deep, or not a JSON object.
    """
    try:
        require_readable(path, limit)
        content = json_cache.get(path, lambda: _parse(read_text(path, limit)))
    except (OSError, ValueError, RecursionError) as error:
        raise AfaError("AFA-FILE-004", f"'{path}' cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise AfaError(
            "AFA-FILE-005", f"'{path}' must contain a JSON object; got {str(content)[:80]}."
        )
    return content


def _parse(text: str) -> Any:
    content = json.loads(text)
    if depth_of(content) > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    return content


def depth_of(content: Any) -> int:
    """Return the nesting depth of lists and objects; 0 for a number or a string."""
    depth, level = 0, [content]
    while outer := [each for each in level if isinstance(each, dict | list)]:
        level = [x for each in outer for x in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def slug(text: str) -> str:
    """Convert a text to a part of a file name: lower-case letters and digits, at most 48."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "prompt"
