"""A folder, an archive or a list of pictures with captions."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from afa.reading import WHITE, BrokenPicture, read_picture
from afa.reading.broken import MissingCaption
from afa.training.data.images import Stored
from afa.training.data.layout import read_place
from afa.training.data.rows import CaptionOptions, as_text, relative

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL import Image

    from afa.reading.picture import Colour


class FolderImages:
    """Pictures with their captions in a folder, a zip archive or a list.

    A folder follows one of two conventions. Hugging Face `imagefolder`: a `metadata.jsonl`, `.csv`
    or `.parquet` has a `file_name`, relative to the folder, and a `text` for each picture. Without
    such a file, kohya's trainers and SimpleTuner: each picture in the folder or its subfolders has
    its captions in the lines of a `.txt` or `.caption` file of the same name. If there is a folder
    `train`, it is the one that is used.

    Args:
        folder: of the pictures; or a `.zip` of such a folder, which is not unpacked; or a CSV,
            JSON or parquet file that lists pictures.
        background: colour on which transparent pictures are composited.
        options: how captions are read; by default, the first of each picture.
        named: the folder's name for the user, if it was downloaded.

    Raises:
        AfaError: if there is no folder or no caption, a list is empty or invalid, or a listed
            picture is missing; on access a `BrokenSample`, if a picture cannot be decoded or has no
            caption.
    """

    def __init__(
        self,
        folder: Path,
        background: Colour = WHITE,
        options: CaptionOptions | None = None,
        *,
        named: Path | str | None = None,
    ) -> None:
        self._folder, self._background = folder, background
        self._options = options or CaptionOptions()
        self._place, found = read_place(folder, self._options)
        self._samples = found.rows
        #: files of the folder that are not used
        self.unused = found.unused
        #: warnings for the user, one line each
        self.warnings = found.warnings
        #: what was read, for the user
        self.source = found.source.replace(str(folder), str(named or folder))
        self._remedy = found.remedy

    def __repr__(self) -> str:
        return f"FolderImages({str(self._folder)!r}, {len(self)} pictures)"

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def rows(self) -> list[tuple[Path, str | None]]:
        """Pictures and their first captions; None for a missing caption."""
        return [(row.path, row.captions[0] if row.captions else None) for row in self._samples]

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        picture, captions = self.sample(index)
        return picture, captions[0]

    def sample(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See `afa.training.data.images.sample_of`."""
        path, captions, _ = self._samples[index]
        if not captions:
            raise MissingCaption(
                "AFA-TRAIN-024", f"The picture '{path}' has no caption. {self._remedy}"
            )
        picture = read_picture(
            self._place.picture(path), str(path), self._remedy, background=self._background
        )
        return picture, captions

    def captions(self) -> Iterator[tuple[str, ...]]:
        """See `afa.training.data.images.captions_in`."""
        return (row.captions for row in self._samples)

    def stored(self, index: int) -> Stored:
        """The picture's file, or its bytes in an archive, and its captions."""
        path, captions, _ = self._samples[index]
        try:
            return Stored(self._place.picture(path), as_text(captions))
        except BrokenPicture as error:  # reported when the picture is read
            return Stored(f"unreadable: {error}".encode(errors="replace"), as_text(captions))

    def name(self, index: int) -> str:
        """The picture's path."""
        return str(self._samples[index].path)

    def repeats(self, index: int) -> int:
        """How often the sample is used, relative to the others."""
        return self._samples[index].repeats

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the background, the captions and the pictures' names, sizes and mtimes."""
        digest = hashlib.sha256(json.dumps(self._background).encode())
        for path, captions, _ in self._samples:
            text = as_text(captions) if captions else None
            row = [relative(path, self._folder), *self._place.state(path), text]
            digest.update(json.dumps(row).encode())
        return f"folder {digest.hexdigest()}"
