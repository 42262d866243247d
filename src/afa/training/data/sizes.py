"""The sizes of the pictures of a data set, mostly without decoding them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from afa.reading import BrokenSample
from afa.reading.size import stated_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from PIL import Image

    from afa.training.data.images import CaptionedImages, Stored

_CHUNK = 256  # samples between two reports of progress
#: pictures that are opened for their sizes, where nothing has read them yet
MOST_OPENED = 10_000


def size_of(stored: Stored, read: Callable[[], tuple[Image.Image, Any]]) -> tuple[int, int] | str:
    """Width and height of a sample's picture; its error message if the size cannot be read.

    A damaged picture has a size if its header is complete.

    Args:
        stored: the sample in its stored form.
        read: reads the picture, if its header does not determine the size.

    Raises:
        AfaError: from `read`, if it is not about this sample alone.
    """
    with _silently():
        return _size_of(stored, read)


def _silently() -> AbstractContextManager[Any]:
    """Ignore Pillow's warnings, which `read_picture` counts; for one thread, or around all."""
    return warnings.catch_warnings(action="ignore")


def _size_of(stored: Stored, read: Callable[[], tuple[Image.Image, Any]]) -> tuple[int, int] | str:
    size = stated_size(stored.picture)
    if size is not None:
        return size
    try:
        return read()[0].size
    except BrokenSample as error:
        return str(error)


def opened_sizes(
    data: CaptionedImages, most: int = MOST_OPENED
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield samples with the sizes of their pictures, of which none is decoded.

    A PNG with its orientation after the pixels is taken as upright. Pictures whose header does not
    state a size are left out.

    Args:
        data: pictures.
        most: maximum number of pictures, evenly spaced.
    """
    step = max(1, -(-len(data) // most))
    for n in range(0, len(data), step):
        with _silently():
            size = stated_size(data.stored(n).picture, may_decode=False)
        if size is not None:
            yield n, size


def sizes_of(
    data: CaptionedImages, samples: Sequence[int]
) -> Iterator[list[tuple[int, tuple[int, int] | str]]]:
    """Yield samples with their sizes or error messages, 256 at a time; see `size_of`.

    Raises:
        AfaError: see `size_of`.
    """
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), _CHUNK):
            some = samples[start : start + _CHUNK]
            with _silently():
                found = pool.map(lambda n: _size_of(data.stored(n), lambda: data[n]), some)
                sizes = list(found)
            yield list(zip(some, sizes, strict=True))


def parted(
    pairs: Iterable[tuple[int, tuple[int, int] | str]],
) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """Divide the result of `sizes_of` into the sizes and the error messages, by sample."""
    sizes, broken = dict[int, tuple[int, int]](), dict[int, str]()
    for sample, found in pairs:
        if isinstance(found, str):
            broken[sample] = found
        else:
            sizes[sample] = found
    return sizes, broken
