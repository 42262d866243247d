"""SHA-256 of files: each is read once, also over several starts of the program.

The hash of a large file is kept in the user's cache, under the file's absolute path and its mark
(`afa.files.Mark`: device, inode, size, times). Writing into a file changes its mark; the time of
that change (ctime) cannot be set by a user. A hash is kept only where the mark was the same before
and after the file was read, and old enough that no write could have gone unseen. `--rehash`, or
`afa.trusting(rehash=True)`, ignores what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from afa.files import FileCache, cache_folder, irregular, mark_of, read_text, write_atomic
from afa.policy import policy

if TYPE_CHECKING:
    from pathlib import Path

    from afa.files import Mark

#: bytes from which a hash is kept over several starts; smaller files take milliseconds
MIN_KEPT = 8_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_ENTRY = 20_000  # bytes; a path has 4096 at the most

#: of this process, by `rehash`
_known = {False: FileCache(), True: FileCache()}


def hash_file(file: Path) -> str:
    """SHA-256 of a file, as published beside checkpoints.

    Raises:
        OSError: it cannot be read, or is no regular file, which might have no end.
    """
    if (what := irregular(file)) is not None:
        raise OSError(f"'{file}' is {what} and must be a regular file")
    found: str = _known[policy().rehash].get(file, lambda: _hash(file))
    return found


def _hash(file: Path) -> str:
    """The hash that is kept of a file, or else that of its bytes, which is kept then."""
    mark = mark_of(file)
    if mark is None or mark.size < MIN_KEPT:
        return _digest(file)
    entry = _entry(file)
    kept = None if policy().rehash else _read(entry, file, mark)
    if kept is not None:
        return kept
    is_settled = mark.is_settled  # before it is read
    sha256 = _digest(file)
    if is_settled and mark_of(file) == mark:
        content = {"file": os.path.abspath(file), "mark": list(mark), "sha256": sha256}
        with suppress(OSError):  # no room, or a cache that cannot be written: hashed again then
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(entry, json.dumps(content))
    return sha256


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()
    return cache_folder() / "hashes" / f"{name[:32]}.json"


def _read(entry: Path, file: Path, mark: Mark) -> str | None:
    """What is kept of a file in this state; None where that is nothing, damaged or another's."""
    try:
        if not _is_own(entry):
            return None
        content = json.loads(read_text(entry, _MAX_ENTRY))
        if (content["file"], content["mark"]) != (os.path.abspath(file), list(mark)):
            return None
        return content["sha256"] if _SHA256.fullmatch(content["sha256"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_own(entry: Path) -> bool:
    """Whether this user alone can have written it; where a system has no users, anybody is."""
    found = entry.stat()
    user = getattr(os, "geteuid", lambda: found.st_uid)()
    return found.st_uid == user and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
