"""Convert grey pictures of 16 and 32 bits and of floating point to 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: possible values of white if metadata is missing: 8, 16 and 32 bits (signed in Pillow)
_WHITES = (255, 65_535, 2_147_483_647)
_HALF_LEVEL = 0.5 / 255
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF 6.0
_WHITE_IS_ZERO = 0


def is_deep(mode: str) -> bool:
    """Whether this mode of Pillow has more than 8 bits per value."""
    return mode.startswith("I") or mode == "F"


def as_grey(picture: Image.Image, tags: Any = None, file_format: str | None = None) -> Image.Image:
    """Convert a picture in a deep mode to `L`, or to `LA` if one of its values is transparent.

    Pillow's own `convert` clips such values at 255, which makes most pictures white. Black is 0.
    White is 65535 for 16 bits, or the maximum of a TIFF's BitsPerSample (12 bits are stored in 16),
    and 1.0 for floating point. For 32-bit integers, white is the smallest of 255, 65535 and
    2147483647 that no value exceeds, since some programs store 8 and 16 bits in 32.

    Args:
        picture: mode `I`, `I;16` or one of its variants, or `F`.
        tags: of a TIFF.
        file_format: of the file, by Pillow's name.

    Raises:
        ValueError: if values are negative, non-finite, or above 1.0 in floating point, so that
            white is unknown.
    """
    tags = tags or {}
    values = np.asarray(picture)
    transparent = picture.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    if picture.mode == "F":
        levels = _from_float(values)
    else:
        levels = _from_integers(values, _white(picture.mode, values, tags, file_format))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only 8 bits
        levels = 255 - levels
    grey = Image.fromarray(levels)
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _white(mode: str, values: NDArray[Any], tags: Any, file_format: str | None) -> int:
    bits = int(tags.get(_BITS, (0,))[0])
    if mode != "I":
        return 2**bits - 1 if 8 < bits < 16 else 65_535
    if bits == 16:  # signed
        return 32_767
    if file_format in ("PPM", "PNG"):  # always scaled to 16 bits by Pillow
        return 65_535
    most = int(values.max(initial=0))
    return next(white for white in _WHITES if most <= white)


def _from_integers(values: NDArray[Any], white: int) -> NDArray[np.uint8]:
    if values.min(initial=0) < 0:
        raise ValueError(
            f"it has values from {values.min()} to {values.max()}, but black must be 0; convert "
            "it to unsigned 8 or 16 bits"
        )
    wide = values.astype(np.uint64)
    return np.minimum((wide * 255 + white // 2) // white, 255).astype(np.uint8)


def _from_float(values: NDArray[Any]) -> NDArray[np.uint8]:
    least, most = values.min(initial=0), values.max(initial=0)
    # NaN compares as false
    if not (least >= -_HALF_LEVEL and most <= 1 + _HALF_LEVEL):
        raise ValueError(
            f"it has floating-point values from {least:.4g} to {most:.4g}, but they must be from "
            "0 (black) to 1 (white); scale it, or convert it to 8 or 16 bits"
        )
    return np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8)
