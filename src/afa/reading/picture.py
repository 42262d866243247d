"""Read one picture from a file or bytes as 8-bit sRGB without transparency."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from afa.files import irregular
from afa.reading.broken import BrokenPicture
from afa.reading.depth import as_grey, is_deep
from afa.reading.formats import NUM_HEAD, foreign_format, raw_photograph, readable_formats
from afa.reading.profiles import UnusableProfile, apply_profile, lab_as_rgb
from afa.reading.tally import Conversion

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
#: key in `Image.info` of a picture from `read_picture`
_CONVERSIONS = "afa conversions"

#: errors of Pillow's readers for damaged files
DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,  # raised by Pillow for a broken PNG
    EOFError,
    LookupError,
    NotImplementedError,  # for example a pixel format of DDS that Pillow does not decode
    OverflowError,
    struct.error,
    zlib.error,
)
#: `warnings.catch_warnings` is not thread-safe
_warnings_lock = threading.Lock()
#: formats whose further frames are previews, or layers of the first picture
_MANY_IN_ONE = ("MPO", "PSD")
_SRGB_GAMMA, _GAMMA_TOLERANCE = 1 / 2.2, 0.02
_INTEROP, _INTEROP_INDEX, _ADOBE_RGB = ExifTags.IFD.Interop, 1, "R03"  # Exif 2.3, DCF option file


def read_picture(
    source: Path | bytes,
    name: str | None = None,
    remedy: str = "Replace or remove it.",
    *,
    background: Colour = WHITE,
) -> Image.Image:
    """Read a picture: upright, RGB, 8 bits, sRGB, without transparency.

    Deep grey values are scaled (see `afa.reading.depth`), an embedded colour profile is converted
    to sRGB, transparent pixels are composited on `background`, and EXIF orientation is applied. Of
    an animation or a TIFF with several pages, the first is read. `conversions_of` returns which of
    these were done.

    Args:
        source: a file, or its bytes.
        name: for errors; by default the file's path.
        remedy: the last sentence of errors.
        background: red, green and blue, 0 to 255.

    Raises:
        BrokenPicture: if it is missing, not a regular file, damaged, too large, of an unknown
            format, or its range of values is unknown.
    """
    name = name or (str(source) if isinstance(source, Path) else "a picture")
    head, done = b"", set[Conversion]()
    if isinstance(source, Path) and (what := irregular(source)) is not None:
        raise BrokenPicture(
            "AFA-PICTURE-001", f"'{name}' is {what}; it must be a regular file. {remedy}"
        )
    try:
        head = _head(source)
        with _warnings_lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            upright, tags, file_format = _decoded(source, head, done)
        # the warning about an unusually large picture does not mean damage
        if any(not issubclass(each.category, Image.DecompressionBombWarning) for each in caught):
            done.add(Conversion.METADATA)
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except DECODING_ERRORS as error:
        foreign = foreign_format(head)
        if foreign is not None and not (isinstance(error, OSError) and error.errno):
            what, advice = foreign
            raise BrokenPicture(
                "AFA-PICTURE-002", f"'{name}' is {what}, which cannot be read. {advice}"
            ) from error
        raise _broken(name, error, remedy) from error
    try:
        picture = _in_srgb(upright, background, done, tags, file_format)
    except ValueError as error:
        raise _broken(name, error, remedy) from error
    picture.info = {_CONVERSIONS: frozenset(done)}
    return picture


def conversions_of(picture: Image.Image) -> frozenset[Conversion]:
    """Return the conversions that `read_picture` did; empty for other pictures."""
    return picture.info.get(_CONVERSIONS, frozenset())


def as_rgb(picture: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Convert a picture in memory like `read_picture`, without applying EXIF orientation.

    Raises:
        BrokenPicture: if its range of values is unknown; see `afa.reading.depth`.
    """
    if picture.mode == "RGB" and not {"icc_profile", "transparency"} & picture.info.keys():
        return picture
    try:
        return _in_srgb(picture, background, set(), getattr(picture, "tag_v2", None))
    except ValueError as error:
        raise BrokenPicture(
            "AFA-PICTURE-003",
            f"A picture of mode {picture.mode} cannot be converted: {error}.",
        ) from error


def parse_colour(text: str) -> Colour:
    """Parse a colour's name or `#rrggbb` to red, green and blue.

    Raises:
        ValueError: if it is not a colour, or has an alpha value.
    """
    parts = ImageColor.getrgb(text)
    if len(parts) != len(WHITE):
        raise ValueError(f"'{text}' has an alpha value; a background must be opaque")
    return parts[0], parts[1], parts[2]


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:NUM_HEAD]
    with source.open("rb") as file:
        return file.read(NUM_HEAD)


def _decoded(
    source: Path | bytes, head: bytes, done: set[Conversion]
) -> tuple[Image.Image, Any, str | None]:
    """Return the first frame, upright; a TIFF's tags; the format."""
    opened = source if isinstance(source, Path) else io.BytesIO(source)
    with Image.open(opened, formats=readable_formats()) as picture:
        if raw_photograph(picture, head):
            raise ValueError(
                "it is a camera's raw file, and only its preview can be read; develop it to TIFF, "
                "PNG or JPEG"
            )
        if getattr(picture, "is_animated", False) and picture.format not in _MANY_IN_ONE:
            done.add(Conversion.FRAMES)
        if _states_other_colours(picture):
            done.add(Conversion.STATED_COLOURS)
        tags, file_format = getattr(picture, "tag_v2", None), picture.format
        return ImageOps.exif_transpose(picture), tags, file_format


def _states_other_colours(picture: Image.Image) -> bool:
    """Whether a picture without a profile has other metadata of a space that is not sRGB."""
    if picture.info.get("icc_profile") or "srgb" in picture.info:
        return False
    gamma = picture.info.get("gamma")
    if gamma and abs(gamma - _SRGB_GAMMA) > _GAMMA_TOLERANCE:
        return True
    exif = picture.getexif()
    if not exif or _INTEROP not in exif.get_ifd(ExifTags.IFD.Exif):
        return False
    return exif.get_ifd(_INTEROP).get(_INTEROP_INDEX) == _ADOBE_RGB


def _in_srgb(
    picture: Image.Image,
    background: Colour,
    done: set[Conversion],
    tags: Any = None,
    file_format: str | None = None,
) -> Image.Image:
    """Convert a picture to RGB in sRGB; add the conversions to `done`."""
    profile = picture.info.get("icc_profile")
    if is_deep(picture.mode):
        picture = as_grey(picture, tags, file_format)
        done.add(Conversion.DEPTH)
    alpha = None
    if picture.has_transparency_data:
        grey = picture.mode in ("1", "L", "LA", "La")
        picture = picture.convert("LA" if grey else "RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("L" if grey else "RGB")
    elif picture.mode not in ("RGB", "L", "CMYK", "LAB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    picture = _converted(picture, profile, done)
    if alpha is None or alpha.getextrema()[0] == 255:
        return picture
    done.add(Conversion.ALPHA)
    picture.putalpha(alpha)
    base = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(base, picture).convert("RGB")


def _converted(picture: Image.Image, profile: bytes | None, done: set[Conversion]) -> Image.Image:
    """Convert a picture of mode RGB, L, CMYK or LAB to sRGB."""
    if picture.mode == "LAB":
        done.add(Conversion.PROFILE)
        return lab_as_rgb(picture)
    if profile:
        try:
            converted, is_changed = apply_profile(picture, profile)
        except UnusableProfile:
            done.add(Conversion.BAD_PROFILE)
        else:
            if is_changed:
                done.add(Conversion.PROFILE)
            return converted
    if picture.mode == "CMYK":
        done.add(Conversion.CMYK)
    return picture.convert("RGB")


def _broken(name: str, error: Exception, remedy: str) -> BrokenPicture:
    text = " ".join(str(error).split()) or type(error).__name__
    return BrokenPicture(
        "AFA-PICTURE-004",
        f"'{name}' cannot be read as a complete picture: {text}. {remedy}",
    )


def _too_large(name: str, message: str) -> BrokenPicture:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    found = re.search(r"\((\d+) pixels\)", message)
    count = f"{int(found[1]):,}" if found else "too many"
    return BrokenPicture(
        "AFA-PICTURE-005",
        f"'{name}' has {count} pixels; the maximum is {limit:,}, so that a small file cannot fill "
        "the memory. Scale it down.",
    )
