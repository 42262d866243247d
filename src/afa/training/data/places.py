"""Places with the files of a data set: a folder, or an archive that is read without unpacking."""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Protocol

from afa.errors import AfaError
from afa.files import irregular, read_text, require_readable, require_text
from afa.reading import BrokenPicture, files_in, is_system_file

#: maximum bytes of a picture in an archive, whose declared size may be wrong
_MAX_PICTURE = 1_000_000_000
#: maximum number of files in an archive
_MAX_FILES = 10_000_000
#: errors of `zipfile` for damaged, encrypted or unknown archives
_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
)


class Place(Protocol):
    """The files of a data set. All paths begin with `root`, also those inside an archive.

    Attributes:
        root: the folder, or the archive's file.
    """

    root: Path

    def files(self) -> list[Path]:
        """All files in the order of their names, without hidden ones."""

    def exists(self, path: Path) -> bool:
        """Whether there is such a file, even one that cannot be read or is a broken link."""

    def is_file(self, path: Path) -> bool:
        """Whether a path is a regular file, with links followed."""

    def irregular(self, path: Path) -> str | None:
        """See `afa.files.irregular`."""

    def text(self, path: Path, limit: int) -> str:
        """See `afa.files.read_text`."""

    def content(self, path: Path, limit: int) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is too large, or not a regular file.
        """

    def picture(self, path: Path) -> Path | bytes:
        """What `read_picture` reads.

        Raises:
            BrokenPicture: if it cannot be read from an archive.
        """

    def state(self, path: Path) -> list[str]:
        """What changes if a file is written to."""


class Folder:
    """A folder on disk; see `Place`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self) -> list[Path]:
        """See `Place`; with linked files and folders."""
        return list(files_in(self.root))

    def exists(self, path: Path) -> bool:
        """See `Place`."""
        return os.path.lexists(path)

    def is_file(self, path: Path) -> bool:
        """See `Place`."""
        return path.is_file()

    def irregular(self, path: Path) -> str | None:
        """See `Place`."""
        return irregular(path)

    def text(self, path: Path, limit: int) -> str:
        """See `Place`."""
        return read_text(path, limit)

    def content(self, path: Path, limit: int) -> bytes:
        """See `Place`."""
        require_readable(path, limit)
        return path.read_bytes()

    def picture(self, path: Path) -> Path:
        """See `Place`."""
        return path

    def state(self, path: Path) -> list[str]:
        """See `Place`: size and modification time; empty for a broken link."""
        try:
            found = path.stat()
        except OSError:  # reading the picture reports it
            return []
        return [str(found.st_size), str(found.st_mtime_ns)]


class Zip:
    """A zip archive, which is never unpacked, so it can write nowhere; see `Place`.

    Args:
        root: the archive's file.

    Raises:
        AfaError: if it is no zip archive, is encrypted, or has links, duplicate names or names that
            lead out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._archive.infolist()
        except _ERRORS as error:
            raise AfaError(
                "AFA-TRAIN-077",
                f"'{root}' cannot be read as a zip archive: {error}. Download or pack it again.",
            ) from error
        if len(members) > _MAX_FILES:
            raise self._refused(f"{len(members)} files", f"have at most {_MAX_FILES}")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            if not member.filename.endswith("/"):
                self._add(member)

    def _add(self, member: zipfile.ZipInfo) -> None:
        name = member.filename
        parts = name.split("/")
        if not name or name.startswith("/") or "\\" in name or ".." in parts:
            raise self._refused(f"a file named {name[:80]!r}", "have names inside of it")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise self._refused(f"a link, {name[:80]!r}", "have files instead of links")
        if member.flag_bits & 1:
            raise self._refused(f"an encrypted file, {name[:80]!r}", "not be encrypted")
        name = "/".join(part for part in parts if part not in ("", "."))
        if name in self._members:
            raise self._refused(f"two files named {name[:80]!r}", "have different names")
        self._members[name] = member

    def _refused(self, has: str, must: str) -> AfaError:
        return AfaError(
            "AFA-TRAIN-067",
            f"The zip archive '{self.root}' has {has}; it must {must}. Unpack it with a program "
            "that you trust, and set data.folder to the folder.",
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    @property
    def _archive(self) -> zipfile.ZipFile:
        """The open archive; forked processes would share the position of an inherited file."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.root)
        return self._opened[1]

    def _member(self, path: Path) -> zipfile.ZipInfo | None:
        if not path.is_relative_to(self.root):
            return None
        return self._members.get(path.relative_to(self.root).as_posix())

    @cached_property
    def _files(self) -> list[Path]:
        named = sorted(tuple(name.split("/")) for name in self._members)
        return [
            self.root.joinpath(*parts)
            for parts in named
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts)
            and not is_system_file(parts[-1])
        ]

    def files(self) -> list[Path]:
        """See `Place`."""
        return self._files

    def exists(self, path: Path) -> bool:
        """See `Place`."""
        return self._member(path) is not None

    def is_file(self, path: Path) -> bool:
        """See `Place`."""
        return self._member(path) is not None

    def irregular(self, path: Path) -> None:
        """See `Place`: only regular files are accepted."""
        del path

    def text(self, path: Path, limit: int) -> str:
        """See `Place`."""
        text = io.TextIOWrapper(io.BytesIO(self.content(path, limit)), encoding="utf-8-sig")
        return require_text(text.read())

    def content(self, path: Path, limit: int) -> bytes:
        """See `Place`; at most the declared size is unpacked, which is checked first."""
        member = self._member(path)
        if member is None:
            raise FileNotFoundError(f"'{path}' does not exist")
        if member.file_size > limit:
            raise ValueError(f"it has {member.file_size} bytes, the maximum is {limit}")
        try:
            return self._archive.read(member)
        except _ERRORS as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error

    def picture(self, path: Path) -> bytes:
        """See `Place`."""
        try:
            return self.content(path, _MAX_PICTURE)
        except (OSError, ValueError) as error:
            raise BrokenPicture(
                "AFA-TRAIN-068",
                f"'{path}' cannot be read from the archive: {error}. Pack it again.",
            ) from error

    def state(self, path: Path) -> list[str]:
        """See `Place`: size and checksum."""
        member = self._member(path)
        return [] if member is None else [str(member.file_size), f"{member.CRC:08x}"]
