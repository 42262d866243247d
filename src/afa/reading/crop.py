"""Scale and crop a picture without computing what is cropped."""

from __future__ import annotations

from PIL import Image

#: above this ratio of scaled to cropped pixels, only the crop is computed
_MAX_WASTE = 4


def scale_and_crop(
    picture: Image.Image,
    scaled: tuple[int, int],
    crop: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Scale a picture to `scaled` and return its rectangle `crop`.

    Up to four times the crop's pixels, the complete picture is scaled and then cropped. Above, only
    the crop is computed (`resize(box=...)`): a 20000 x 1 picture would otherwise become
    10 240 000 x 512 pixels. Both ways use the same samples and filter, but Pillow stores `box` in
    single precision, so a few pixels differ by one level. The first way is kept for usual aspect
    ratios because its results are bit-identical to earlier releases.

    Args:
        picture: RGB.
        scaled: width and height of the complete scaled picture.
        crop: left, top, right and bottom in the scaled picture.
    """
    left, top, right, bottom = crop
    width, height = scaled
    is_inside = left >= 0 and top >= 0 and right <= width and bottom <= height
    is_small = width * height <= _MAX_WASTE * (right - left) * (bottom - top)
    if scaled == picture.size or is_small or not is_inside:
        if scaled != picture.size:
            picture = picture.resize(scaled, resample)
        return picture.crop(crop)
    across, down = picture.width / width, picture.height / height
    box = (
        left * across,
        top * down,
        min(right * across, picture.width),
        min(bottom * down, picture.height),
    )
    return picture.resize((right - left, bottom - top), resample, box=box)
