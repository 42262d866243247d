"""List a data set as hashes of its pictures and captions.

A listing shows whether two runs have the same data, and which samples have the same picture. The
hash of a picture is the SHA-256 of its file or bytes: it does not depend on name, folder or
modification time, so the same file under two names is one picture. A picture that was encoded again
is a different picture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from afa.files import write_atomic
from afa.loading.weights import loading
from afa.machine.hashes import hash_file
from afa.reading import counted
from afa.training.data import Joined, SceneImages
from afa.training.data.images import whole_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from afa.training.data import CaptionedImages, Stored, StreamedImages

#: file name of the listing in a run's folder
LISTING = "data.safetensors"
_WIDTH = 16  # bytes of a hash
_CHUNK = 1024  # samples between two reports of progress
_NO_MARK = bytes(_WIDTH)

#: hash of a sample's picture, hash of its caption, mark of its file
Row = tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class Listing:
    """Hashes of all samples in order, each [samples, 16] bytes.

    Attributes:
        pictures: of the pictures' content.
        captions: of the captions.
        marks: of each file's path, size, times and inode, to recognise an unchanged file without
            reading it; zeros for a picture without its own file.
    """

    pictures: NDArray[np.uint8]
    captions: NDArray[np.uint8]
    marks: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Listing:
        """Create a listing from the rows of its samples."""
        pictures, captions, marks = (
            np.frombuffer(b"".join(column), np.uint8).reshape(-1, _WIDTH)
            for column in (zip(*rows, strict=True) if rows else ([], [], []))
        )
        return cls(pictures, captions, marks)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def digest(self) -> str:
        """SHA-256 of all pictures and captions in order."""
        content = np.concatenate([self.pictures, self.captions], axis=1)
        return hashlib.sha256(content.tobytes()).hexdigest()

    def hashes(self, count: int | None = None) -> list[tuple[bytes, bytes]]:
        """Return the hashes of the picture and of the captions of all or the first samples."""
        pairs = zip(self.pictures[:count], self.captions[:count], strict=True)
        return [(picture.tobytes(), caption.tobytes()) for picture, caption in pairs]

    def known(self) -> dict[bytes, bytes]:
        """Return the hashes of pictures by the marks of their files."""
        pairs = zip(self.marks, self.pictures, strict=True)
        return {m.tobytes(): p.tobytes() for m, p in pairs if m.tobytes() != _NO_MARK}

    def write(self, folder: Path) -> None:
        """Write the listing to a run's folder."""
        tensors = {"pictures": self.pictures, "captions": self.captions, "marks": self.marks}
        write_atomic(folder / LISTING, save(tensors))

    @classmethod
    def read(cls, folder: Path) -> Listing | None:
        """Read the listing in a run's folder; None if it has none.

        Raises:
            AfaError: if the file is damaged.
        """
        place = folder / LISTING
        if not place.is_file():
            return None
        with loading(f"'{place}' must be complete", "Delete it to read every picture again."):
            tensors = load(place.read_bytes())
            return cls(tensors["pictures"], tensors["captions"], tensors["marks"])


def is_settled(data: CaptionedImages | StreamedImages) -> bool:
    """Whether a data set's settings determine every sample, as for the zoo's scenes."""
    return isinstance(whole_of(data), SceneImages)


def settled_parts(data: CaptionedImages) -> str:
    """The fingerprints of the parts that only their settings determine, not their listing."""
    parts = data.parts if isinstance(data, Joined) else ()
    return " ".join(part.fingerprint for part in parts if is_settled(part))


def content_of(data: CaptionedImages, listing: Listing | None) -> str:
    """Return a hash of all that a data set has, for comparison when a run is resumed.

    Args:
        data: pictures and captions.
        listing: of the data; None reads it if it is needed.
    """
    # the listing of scenes has no positions of objects
    if listing is None or is_settled(data):
        return digest_of(data)
    settled = settled_parts(data)
    if not settled:
        return listing.digest
    return hashlib.sha256(json.dumps([listing.digest, settled]).encode()).hexdigest()


def digest_of(data: CaptionedImages) -> str:
    """Return a hash of all pictures and captions of a data set in order.

    Reads all picture files, unless the data set's settings determine them.
    """
    if is_settled(data):
        return hashlib.sha256(data.fingerprint.encode()).hexdigest()
    rows = itertools.chain.from_iterable(rows_of(data, range(len(data))))
    return Listing.of(list(rows)).digest


def rows_of(
    data: CaptionedImages, samples: Sequence[int], known: dict[bytes, bytes] | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of samples, 1024 at a time.

    Args:
        data: pictures and captions; no picture is decoded.
        samples: indices.
        known: hashes of pictures by the marks of their files, to skip reading these.
    """
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), _CHUNK):
            stored = [data.stored(n) for n in samples[start : start + _CHUNK]]
            yield list(pool.map(lambda each: row_of(each, known), stored))


def row_of(stored: Stored, known: dict[bytes, bytes] | None = None) -> Row:
    """Return the row of one sample; see `rows_of`."""
    caption = _short(stored.caption.encode(errors="surrogatepass"))
    if isinstance(stored.picture, bytes):
        return _short(stored.picture), caption, _NO_MARK
    mark = _mark(stored.picture)
    picture = (known or {}).get(mark)
    if picture is None:
        try:
            picture = bytes.fromhex(hash_file(stored.picture))[:_WIDTH]
        except OSError:  # reported and counted as broken when the picture is read
            picture = _short(b"unreadable: " + os.fsencode(stored.picture))
    return picture, caption, mark


def _mark(file: Path) -> bytes:
    """Hash the metadata of a file that changes when it is written to or replaced."""
    try:
        found = file.stat()
    except OSError:
        return _NO_MARK
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return _short(json.dumps([str(file), *state]).encode())


def _short(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_WIDTH]


def difference(before: Listing | None, now: Listing | None, names: CaptionedImages | None) -> str:
    """Describe the difference between the data that a run began with and the current data.

    Args:
        before: of the run; None if unknown.
        now: of the current data.
        names: the data set, for the names of samples; None for a stream.
    """
    if before is None or now is None:
        return "another data set"

    old, new = before.hashes(), now.hashes()
    kept, pictures = set(old), {picture for picture, _ in old}
    added = [n for n, row in enumerate(new) if row[0] not in pictures]
    edited = [n for n, row in enumerate(new) if row[0] in pictures and row not in kept]
    gone = len({picture for picture, _ in old} - {picture for picture, _ in new})

    def first(samples: list[int]) -> str:
        name = f"sample {samples[0]}" if names is None else names.name(samples[0])
        return f" (first: {name})"

    found = [
        f"{counted(len(samples), 'sample')} {what}{first(samples)}"
        for samples, what in (
            (added, "with new pictures"),
            (edited, "with changed captions"),
        )
        if samples
    ]
    found += [f"{counted(gone, 'picture')} missing"] if gone else []
    if not found and len(old) != len(new):
        found = [f"{len(new)} samples instead of {len(old)}"]
    return ", ".join(found) if found else "the samples are in another order"
