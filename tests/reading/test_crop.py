"""Cropping first costs the square and gives what scaling first gives."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from afa.reading import scale_and_crop
from afa.training.transform import Transform

LANCZOS = Image.Resampling.LANCZOS


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def whole_first(
    picture: Image.Image, scaled: tuple[int, int], crop: tuple[int, int, int, int]
) -> Image.Image:
    return picture.resize(scaled, LANCZOS).crop(crop)


@pytest.mark.parametrize("size", [(300, 200), (200, 500), (640, 170), (64, 64), (31, 100)])
def test_usual_aspect_ratios_are_bit_for_bit_what_they_were(size: tuple[int, int]) -> None:
    scale = 64 / min(size)
    scaled = round(size[0] * scale), round(size[1] * scale)
    left, top = (scaled[0] - 64) // 3, (scaled[1] - 64) // 3
    crop = left, top, left + 64, top + 64
    picture = noise(*size)
    made = scale_and_crop(picture, scaled, crop, LANCZOS)
    assert made.tobytes() == whole_first(picture, scaled, crop).tobytes()


@pytest.mark.parametrize("size", [(900, 100), (70, 1001), (2000, 30)])
def test_long_ones_differ_by_a_level_at_most(size: tuple[int, int]) -> None:
    scale = 64 / min(size)
    scaled = round(size[0] * scale), round(size[1] * scale)
    left, top = (scaled[0] - 64) // 3, (scaled[1] - 64) // 3
    crop = left, top, left + 64, top + 64
    picture = noise(*size)
    made = np.asarray(scale_and_crop(picture, scaled, crop, LANCZOS)).astype(int)
    expected = np.asarray(whole_first(picture, scaled, crop)).astype(int)
    assert np.abs(made - expected).max() <= 1
    assert (made != expected).mean() < 0.01


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_strip_costs_the_square(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    resize = Image.Image.resize

    def watched(
        self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object
    ) -> Image.Image:
        asked.append(size)
        return resize(self, size, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    for variant in range(4):
        assert Transform(512)(Image.new("RGB", size), 0, variant).shape == (3, 512, 512)
    assert asked == [(512, 512)] * 4


def test_crops_at_the_very_end() -> None:
    picture = noise(4001, 3)
    scaled = 85355, 64
    crop = scaled[0] - 64, 0, scaled[0], 64
    assert scale_and_crop(picture, scaled, crop, LANCZOS).size == (64, 64)
