"""Scale a picture and cut a rectangle out, without paying for what is cut off."""

from __future__ import annotations

from PIL import Image

#: a scaled picture with more pixels than so many times its crop is not made as a whole
_MAX_WASTE = 4


def scale_and_crop(
    picture: Image.Image,
    scaled: tuple[int, int],
    crop: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """The rectangle `crop` of a picture that was scaled to `scaled`.

    Up to four times the crop's pixels, the whole picture is scaled and then cropped. Beyond that
    only the crop is computed (`resize(box=...)`): a 20000 x 1 picture would otherwise become
    10 240 000 x 512 pixels. Both ways have the same samples and filter, but Pillow keeps `box` in
    single precision, so a few pixels differ by one level; the usual aspect ratios are therefore
    computed in the first way, whose results are those of earlier releases bit for bit.

    Args:
        picture: RGB.
        scaled: width and height that the whole would have.
        crop: left, top, right and bottom in the scaled picture.
        resample: filter.
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
