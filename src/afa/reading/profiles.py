"""Embedded colour profiles to sRGB, by LittleCMS as Pillow has it."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

from PIL import Image, ImageChops, ImageCms

#: levels by which a profile may differ from sRGB and still be taken for it: profiles of several
#: makers do so by one, and pictures that have them must keep their values
_SAME = 2
#: what a profile must be of to be applied to a mode
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


class UnusableProfile(Exception):
    """A profile that is damaged, or of another colour model than the picture."""


def apply_profile(picture: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """A picture in sRGB, and whether its values changed.

    The rendering intent is perceptual, the default of browsers. A grey picture with a profile of
    RGB, as cameras and converters write it, is taken as RGB.

    Args:
        picture: of mode RGB, L or CMYK.
        profile: ICC, as it is embedded.

    Raises:
        UnusableProfile: it cannot be applied.
    """
    space = _space(profile)
    mode = "RGB" if space == "RGB" and picture.mode == "L" else picture.mode
    if _SPACES[mode] != space:
        raise UnusableProfile(f"a profile of {space or 'no known colours'} in {picture.mode}")
    transform = _transform(profile, mode)
    if transform is None:
        return picture.convert("RGB"), False
    try:
        return _applied(transform, picture.convert(mode)), True
    except (ImageCms.PyCMSError, ValueError) as error:
        raise UnusableProfile(str(error)) from error


def lab_as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of mode LAB (D50, as in TIFF) in sRGB; Pillow's `convert` does not do it."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return _applied(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), picture)


def _applied(transform: Any, picture: Image.Image) -> Image.Image:
    done = ImageCms.applyTransform(picture, transform)
    assert done is not None, "None only in place"
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
    """To sRGB; None where that changes nothing."""
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
    """Colours from everywhere in RGB, with many greys."""
    levels = range(0, 256, 15)
    colours = [(red, green, blue) for red in levels for green in levels for blue in levels]
    colours += [(grey, grey, grey) for grey in range(256)]
    return Image.frombytes("RGB", (len(colours), 1), bytes(v for colour in colours for v in colour))
