"""SHA-256 of files, cached in the process and, for large files, on disk.

The hash of a large file is stored in the user's cache, with the file's absolute path and its mark
(`afa.files.Mark`: device, inode, size, times). Writing to a file changes its mark; users cannot set
the time of that change (ctime), except on Windows, where it is the time of creation. A hash is
stored only if the mark did not change while the file was read and is old enough that no write could
be missed. `--rehash`, or `afa.trusting(rehash=True)`, ignores stored hashes.
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

#: bytes from which a hash is stored on disk; smaller files take milliseconds
MIN_KEPT = 8_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_ENTRY = 20_000  # bytes; a path has at most 4096

#: hashes of this process, by `rehash`
hash_caches = {False: FileCache(), True: FileCache()}


def hash_file(file: Path) -> str:
    """SHA-256 of a file, as published with checkpoints.

    Raises:
        OSError: if it cannot be read, or is not a regular file and may be endless.
    """
    if (what := irregular(file)) is not None:
        raise OSError(f"'{file}' is {what} and must be a regular file")
    found: str = hash_caches[policy().rehash].get(file, lambda: _hash(file))
    return found


def _hash(file: Path) -> str:
    """Return the stored hash of a file, or compute and store it."""
    mark = mark_of(file)
    if mark is None or mark.size < MIN_KEPT:
        return compute_sha256(file)
    entry = _entry(file)
    kept = None if policy().rehash else _read(entry, file, mark)
    if kept is not None:
        return kept
    is_settled = mark.is_settled  # before it is read
    sha256 = compute_sha256(file)
    if is_settled and mark_of(file) == mark:
        content = {"file": os.path.abspath(file), "mark": list(mark), "sha256": sha256}
        with suppress(OSError):  # without a writable cache, it is computed again next time
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(entry, json.dumps(content))
    return sha256


def compute_sha256(file: Path) -> str:
    """Compute the SHA-256 of a file's bytes, without any cache."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()
    return cache_folder() / "hashes" / f"{name[:32]}.json"


def _read(entry: Path, file: Path, mark: Mark) -> str | None:
    """Return the stored hash of a file; None if missing, outdated, damaged or not the user's."""
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
    """Whether only this user can have written it; True on Windows, which has no such modes."""
    if not hasattr(os, "geteuid"):
        return True
    found = entry.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
