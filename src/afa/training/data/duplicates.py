"""Pictures that look the same, by their perceptual hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

#: side in pixels of the picture that is hashed, and of the thumbnail that is compared
_HASHED, _THUMBNAIL = 64, 4
#: bits of the hash that may differ: fewer than its four bands of 16 bits, so that one band is equal
_MAX_BITS = 3
#: levels by which thumbnails may differ, on average: the hash ignores colour and brightness
_MAX_LEVELS = 4.0
#: pictures of one hash that are compared with each other; plain areas have the same
_MAX_GROUP = 2000
_BITS = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


class Pair(NamedTuple):
    """Two samples whose pictures look the same; the first has the lower number."""

    first: int
    second: int


def look_of(picture: Image.Image) -> str:
    """Describe how a picture looks: its perceptual hash of 64 bits and a thumbnail, as hex.

    The hash is pHash: the signs of the low frequencies of the grey picture, relative to their
    median (http://www.phash.org), computed by ImageHash. Scaling and recompression change few bits.

    Args:
        picture: RGB.
    """
    import imagehash

    small = picture.resize((_HASHED, _HASHED), Image.Resampling.BOX)
    bits = np.packbits(imagehash.phash(small).hash)
    thumbnail = small.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return bits.tobytes().hex() + thumbnail.tobytes().hex()


def alike(looks: Mapping[int, str]) -> list[Pair]:
    """Find the samples that look like an earlier one, each with the first such sample.

    Args:
        looks: of samples, see `look_of`.
    """
    samples = np.array(sorted(looks), np.int64)
    if len(samples) < 2:
        return []
    content = b"".join(bytes.fromhex(looks[int(n)]) for n in samples)
    table = np.frombuffer(content, np.uint8).reshape(len(samples), -1)
    bands = np.ascontiguousarray(table[:, :8]).view(np.uint16)
    thumbnails = table[:, 8:].astype(np.float32)
    earlier: dict[int, int] = {}
    for group in _groups(bands):
        for position, row in enumerate(group[:-1]):
            rest = group[position + 1 :]
            bits = _BITS[bands[rest] ^ bands[row]].sum(axis=1)
            near = rest[bits <= _MAX_BITS]
            levels = np.abs(thumbnails[near] - thumbnails[row]).mean(axis=1)
            for other in near[levels <= _MAX_LEVELS].tolist():
                earlier[other] = min(earlier.get(other, other), int(row))
    return [Pair(int(samples[first]), int(samples[n])) for n, first in sorted(earlier.items())]


def _groups(bands: NDArray[np.uint16]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows with one equal band, ascending."""
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, starts):
            if len(group) > 1:
                yield group[:_MAX_GROUP]
