"""A folder of pictures with captions."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from afa.reading import WHITE, read_picture
from afa.reading.broken import MissingCaption
from afa.training.data.captions import Rows, is_listed, rows_beside, rows_listed
from afa.training.data.images import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL import Image

    from afa.reading.picture import Colour


class FolderImages:
    """A folder of pictures with their captions.

    The folder follows one of two conventions. Hugging Face `imagefolder`: each line of a
    `metadata.jsonl` is an object with `file_name`, relative to the folder, and `text`. Without such
    a file, kohya's trainers: each picture in the folder or its subfolders has its caption in the
    first line of a `.txt` or `.caption` file of the same name.

    Args:
        folder: folder of the pictures.
        background: colour on which transparent pictures are composited.

    Raises:
        AfaError: if there is no folder or no caption, the list is empty or invalid, or a listed
            picture is missing; on access a `BrokenSample`, if a picture cannot be decoded or has no
            caption.
    """

    def __init__(self, folder: Path, background: Colour = WHITE) -> None:
        self._folder, self._background = folder, background
        found: Rows = (rows_listed if is_listed(folder) else rows_beside)(folder)
        #: pictures and captions; None for a missing caption
        self.rows = found.rows
        #: files of the folder that are not used
        self.unused = found.unused
        #: warnings for the user, one line each
        self.warnings = found.warnings
        self._remedy = found.remedy

    def __repr__(self) -> str:
        return f"FolderImages({str(self._folder)!r}, {len(self.rows)} pictures)"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        path, text = self.rows[index]
        if text is None:
            raise MissingCaption(
                "AFA-TRAIN-024", f"The picture '{path}' has no caption. {self._remedy}"
            )
        return read_picture(path, remedy=self._remedy, background=self._background), text

    def captions(self) -> Iterator[str | None]:
        """All captions in order, without reading pictures; None for a missing one."""
        return (text for _, text in self.rows)

    def stored(self, index: int) -> Stored:
        """The picture's file and its caption."""
        path, caption = self.rows[index]
        return Stored(path, caption or "")

    def name(self, index: int) -> str:
        """The picture's path."""
        return str(self.rows[index][0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the background, the captions and the pictures' names, sizes and mtimes."""
        digest = hashlib.sha256(json.dumps(self._background).encode())
        for path, text in self.rows:
            place = path.relative_to(self._folder).as_posix()
            try:
                stat = path.stat()
                mark = [str(stat.st_size), str(stat.st_mtime_ns)]
            except OSError:  # a broken link, for example; reading the picture reports it
                mark = []
            digest.update(json.dumps([place, *mark, text]).encode())
        return f"folder {digest.hexdigest()}"
