"""A folder of pictures with captions."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import read_text
from afa.training.data.images import Stored, read_picture

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

_MAX_METADATA = 2_000_000_000  # bytes


class FolderImages:
    """A folder of pictures with `metadata.jsonl`, the Hugging Face `imagefolder` convention.

    Each line of the file is an object with `file_name`, relative to the folder, and `text`.

    Raises:
        AfaError: no folder, no or an empty metadata file, a broken line, a picture that is not
            there; on access, a picture that cannot be decoded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = folder / "metadata.jsonl"
        if not folder.is_dir():
            raise AfaError(f"The data folder '{folder}' does not exist.")
        if not metadata.is_file():
            raise AfaError(
                f"The data folder '{folder}' must hold pictures and a metadata.jsonl with lines "
                'such as {"file_name": "0001.png", "text": "a fox"}; it has no metadata.jsonl.'
            )
        self.rows: list[tuple[Path, str]] = []
        try:
            text = read_text(metadata, _MAX_METADATA)
        except (OSError, ValueError) as error:
            raise AfaError(f"'{metadata}' must be UTF-8 text, but reading it: {error}.") from error
        # not splitlines: a caption may hold a line separator of Unicode
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path, caption = folder / row["file_name"], row["text"]
                valid = isinstance(caption, str)
            except (ValueError, KeyError, TypeError, RecursionError):
                valid = False
            if not valid:
                raise AfaError(
                    f"Line {number} of '{metadata}' must be an object with the strings file_name "
                    f"and text, came {line[:80]!r}."
                )
            if not os.path.normpath(path).startswith(f"{os.path.normpath(folder)}{os.sep}"):
                raise AfaError(
                    f"Line {number} of '{metadata}' must name a file in that folder, came "
                    f"'{row['file_name'][:80]}'. Move the picture there, or link it."
                )
            if not path.is_file():
                raise AfaError(f"Line {number} of '{metadata}' names '{path}', which is missing.")
            self.rows.append((path, caption))
        if not self.rows:
            raise AfaError(f"The data folder '{folder}' must hold pictures; its list is empty.")

    def __repr__(self) -> str:
        return f"FolderImages({str(self._folder)!r}, {len(self.rows)} pictures)"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        path, text = self.rows[index]
        remedy = "Replace it or take its line out of metadata.jsonl."
        return read_picture(path, remedy=remedy), text

    def stored(self, index: int) -> Stored:
        """The picture's file and its caption."""
        path, caption = self.rows[index]
        return Stored(path, caption or "")

    def name(self, index: int) -> str:
        """The picture's path."""
        return str(self.rows[index][0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of change of all pictures, and the captions."""
        digest = hashlib.sha256()
        for path, text in self.rows:
            stat = path.stat()
            place = path.relative_to(self._folder).as_posix()
            digest.update(json.dumps([place, stat.st_size, stat.st_mtime_ns, text]).encode())
        return f"folder {digest.hexdigest()}"
