"""Convert embedded colour profiles to sRGB with Pillow's LittleCMS."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

from PIL import Image, ImageChops, ImageCms

#: maximum difference in levels for a profile to count as sRGB: sRGB profiles of some vendors differ
#: by one, and their pictures must keep their values
_SAME = 2
#: the colour space of profiles for each mode
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


class UnusableProfile(Exception):
    """A profile that is damaged, or for another colour model than the picture's."""


def apply_profile(picture: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """Convert a picture to sRGB; also return whether its values changed.

    The rendering intent is perceptual, the default of browsers. A grey picture with an RGB profile,
    which cameras and converters write, is treated as RGB.

    Args:
        picture: of mode RGB, L or CMYK.

    Raises:
        UnusableProfile: if it cannot be applied.
    """
    space = _space(profile)
    mode = "RGB" if space == "RGB" and picture.mode == "L" else picture.mode
    if _SPACES[mode] != space:
        raise UnusableProfile(f"a profile for {space or 'unknown colours'} in {picture.mode}")
    transform = _transform(profile, mode)
    if transform is None:
        return picture.convert("RGB"), False
    try:
        return _applied(transform, picture.convert(mode)), True
    except (ImageCms.PyCMSError, ValueError) as error:
        raise UnusableProfile(str(error)) from error


def lab_as_rgb(picture: Image.Image) -> Image.Image:
    """Convert a LAB picture (D50, as in TIFF) to sRGB; Pillow's `convert` cannot."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return _applied(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), picture)


def _applied(transform: Any, picture: Image.Image) -> Image.Image:
    done = ImageCms.applyTransform(picture, transform)
    assert done is not None, "None only with inPlace"
    return done


@lru_cache(maxsize=32)
def _space(profile: bytes) -> str:
    try:
        return _opened(profile).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UnusableProfile(str(error)) from error


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the transform of a profile to sRGB; None if it changes nothing."""
    try:
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(_opened(profile), srgb, mode, "RGB")
        if mode == "CMYK":
            return transform
        sample = _sample().convert(mode)
        changed = ImageChops.difference(_applied(transform, sample), sample.convert("RGB"))
    except (ImageCms.PyCMSError, ValueError) as error:
        raise UnusableProfile(str(error)) from error
    extremes: Any = changed.getextrema()
    return None if max(most for _, most in extremes) <= _SAME else transform


@lru_cache(maxsize=1)
def _sample() -> Image.Image:
    """Create a picture with colours from all of RGB, and all greys."""
    levels = range(0, 256, 15)
    colours = [(red, green, blue) for red in levels for green in levels for blue in levels]
    colours += [(grey, grey, grey) for grey in range(256)]
    return Image.frombytes("RGB", (len(colours), 1), bytes(v for colour in colours for v in colour))
