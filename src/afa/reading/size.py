"""Read the size of a picture without decoding it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import ExifTags, Image

from afa.files import irregular
from afa.reading.formats import readable_formats
from afa.reading.picture import DECODING_ERRORS

#: formats whose decoded pictures have the size that their headers state
_STATED = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF")
#: values of the EXIF orientation that swap width and height
_TURNED = (5, 6, 7, 8)


def stated_size(source: Path | bytes, *, may_decode: bool = True) -> tuple[int, int] | None:
    """Width and height of the picture that `read_picture` would return.

    The pixels are not decoded, except those of a PNG without EXIF data before them, because these
    may follow and state another orientation.

    Args:
        source: a file, or its bytes.
        may_decode: whether such a PNG is decoded; without, its orientation is not applied.

    Returns: None if only `read_picture` can tell: the file is damaged or of another format.
    """
    if isinstance(source, Path) and irregular(source) is not None:
        return None
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(opened, formats=readable_formats()) as picture:
            if picture.format not in _STATED:
                return None
            width, height = picture.size
            is_late = picture.format == "PNG" and "exif" not in picture.info
            if is_late and not may_decode:
                return width, height
            if picture.getexif().get(ExifTags.Base.Orientation) in _TURNED:
                return height, width
    except (Image.DecompressionBombError, *DECODING_ERRORS):
        return None
    return width, height
