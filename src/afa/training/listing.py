"""What the samples of a data set are: a hash of each picture and of each caption.

A listing tells whether two runs have the same data, and which samples show the same picture. A
picture is told by the SHA-256 of its file or bytes: a new name, another folder or a new time of
change make no other picture, and the same file under two names is one picture. A picture that was
encoded again is another one.
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
from afa.training.data import Part, SceneImages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from afa.training.data import CaptionedImages, Stored

#: the file of a run that keeps the listing of its data
LISTING = "data.safetensors"
_WIDTH = 16  # bytes of a hash
_CHUNK = 1024  # samples between two reports of progress
_NO_MARK = bytes(_WIDTH)

#: of a sample: hashes of its picture and its caption, and the mark of its file
Row = tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class Listing:
    """Hashes of all samples in their order, each [samples, 16] bytes.

    Attributes:
        pictures: of the pictures' content.
        captions: of the captions.
        marks: of each file's path, size, times and inode, by which a file that nobody wrote into
            is known again without reading it; zeros where a picture has no file of its own.
    """

    pictures: NDArray[np.uint8]
    captions: NDArray[np.uint8]
    marks: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Listing:
        """The listing of samples, in their order."""
        pictures, captions, marks = (
            np.frombuffer(b"".join(column), np.uint8).reshape(-1, _WIDTH)
            for column in (zip(*rows, strict=True) if rows else ([], [], []))
        )
        return cls(pictures, captions, marks)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def digest(self) -> str:
        """SHA-256 of all pictures and captions in their order."""
        content = np.concatenate([self.pictures, self.captions], axis=1)
        return hashlib.sha256(content.tobytes()).hexdigest()

    def known(self) -> dict[bytes, bytes]:
        """The hash of a picture by the mark of its file."""
        pairs = zip(self.marks, self.pictures, strict=True)
        return {m.tobytes(): p.tobytes() for m, p in pairs if m.tobytes() != _NO_MARK}

    def write(self, folder: Path) -> None:
        """Keep the listing in a run's folder."""
        tensors = {"pictures": self.pictures, "captions": self.captions, "marks": self.marks}
        write_atomic(folder / LISTING, save(tensors))

    @classmethod
    def read(cls, folder: Path) -> Listing | None:
        """The listing that a run's folder keeps; None where it keeps none.

        Raises:
            AfaError: the file is damaged.
        """
        place = folder / LISTING
        if not place.is_file():
            return None
        with loading(f"'{place}' must be complete", "Delete it; every picture is then read again."):
            tensors = load(place.read_bytes())
            return cls(tensors["pictures"], tensors["captions"], tensors["marks"])


def is_settled(data: object) -> bool:
    """Whether settings decide every sample of a data set, as they do of the zoo's scenes."""
    while isinstance(data, Part):
        data = data.whole
    return isinstance(data, SceneImages)


def digest_of(data: CaptionedImages) -> str:
    """A hash of all pictures and captions of a data set in their order.

    Every picture's file is read, unless settings decide all of them.
    """
    if is_settled(data):
        return hashlib.sha256(data.fingerprint.encode()).hexdigest()
    rows = itertools.chain.from_iterable(rows_of(data, range(len(data))))
    return Listing.of(list(rows)).digest


def rows_of(
    data: CaptionedImages, samples: Sequence[int], known: dict[bytes, bytes] | None = None
) -> Iterator[list[Row]]:
    """The rows of some samples of a data set, a thousand at a time.

    Args:
        data: pictures and captions; no picture is decoded.
        samples: which ones.
        known: hashes of pictures by the marks of their files, which are not read again.
    """
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), _CHUNK):
            stored = [data.stored(n) for n in samples[start : start + _CHUNK]]
            yield list(pool.map(lambda each: row_of(each, known), stored))


def row_of(stored: Stored, known: dict[bytes, bytes] | None = None) -> Row:
    """The row of one sample; see `rows_of`."""
    caption = _short(stored.caption.encode(errors="surrogatepass"))
    if isinstance(stored.picture, bytes):
        return _short(stored.picture), caption, _NO_MARK
    mark = _mark(stored.picture)
    picture = (known or {}).get(mark)
    if picture is None:
        try:
            picture = bytes.fromhex(hash_file(stored.picture))[:_WIDTH]
        except OSError:  # told, and counted as broken, by whoever reads the picture
            picture = _short(b"unreadable: " + os.fsencode(stored.picture))
    return picture, caption, mark


def _mark(file: Path) -> bytes:
    """What writing into a file or replacing it changes, whatever its time of change says."""
    try:
        found = file.stat()
    except OSError:
        return _NO_MARK
    told = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return _short(json.dumps([str(file), *told]).encode())


def _short(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_WIDTH]


def difference(before: Listing | None, now: Listing | None, names: CaptionedImages | None) -> str:
    """What differs between the data of a run and the data that it is to go on with, a clause.

    Args:
        before: what the run began with; None where it is not known in detail.
        now: what there is.
        names: the data set, which names samples; None where it cannot.
    """
    if before is None or now is None:
        return "they are other ones"

    def rows(listing: Listing) -> list[tuple[bytes, bytes]]:
        pairs = zip(listing.pictures, listing.captions, strict=True)
        return [(picture.tobytes(), caption.tobytes()) for picture, caption in pairs]

    old, new = rows(before), rows(now)
    kept, pictures = set(old), {picture for picture, _ in old}
    added = [n for n, row in enumerate(new) if row[0] not in pictures]
    edited = [n for n, row in enumerate(new) if row[0] in pictures and row not in kept]
    gone = len({picture for picture, _ in old} - {picture for picture, _ in new})

    def first(samples: list[int]) -> str:
        name = f"sample {samples[0]}" if names is None else names.name(samples[0])
        return f" (first: {name})"

    found = [
        f"{len(samples)} {what}{first(samples)}"
        for samples, what in (
            (added, "samples with pictures that were not there"),
            (edited, "samples with other captions"),
        )
        if samples
    ]
    found += [f"{gone} pictures that are gone"] if gone else []
    if not found and len(old) != len(new):
        found = [f"{len(new)} samples in place of {len(old)}"]
    return "there are " + ", ".join(found) if found else "the samples are in another order"
