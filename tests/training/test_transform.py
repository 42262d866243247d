"""From pictures to pixels: scaled, cropped, mirrored, and always the same for one variant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from afa.training.transform import Transform

WIDE = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (10, 1))).convert("RGB")


def left_column(pixels: torch.Tensor) -> int:
    return round(float((pixels[0, 0, 0] + 1) * 127.5))


def test_random_crops_are_anywhere_and_whole() -> None:
    crops = [Transform(10)(WIDE, sample, 0) for sample in range(200)]
    assert all(crop.shape == (3, 10, 10) for crop in crops)
    assert all(torch.equal(crop[:, 0], crop[:, 9]) for crop in crops)
    assert {left_column(crop) for crop in crops} == set(range(21))


def test_a_variant_is_always_the_same_and_another_one_is_not() -> None:
    transform = Transform(10, num_variants=8, flip=True)
    first, again = transform(WIDE, 3, 1), transform(WIDE, 3, 1)
    assert torch.equal(first, again)
    variants = {left_column(transform(WIDE, 3, n)) for n in range(8)}
    assert len(variants) > 4
    other = Transform(10, num_variants=8, flip=True, seed=1)
    assert any(not torch.equal(transform(WIDE, 3, n), other(WIDE, 3, n)) for n in range(8))
    assert [transform.variant(u) for u in (0.0, 0.124, 0.126, 0.999)] == [0, 0, 1, 7]


def test_half_of_the_variants_are_mirrored() -> None:
    mirrored = [
        bool((pixels := Transform(10, flip=True)(WIDE, n, 0))[0, 0, 0] > pixels[0, 0, -1])
        for n in range(400)
    ]
    assert 150 < sum(mirrored) < 250
    plain = [Transform(10)(WIDE, n, 0) for n in range(100)]
    assert not any(pixels[0, 0, 0] > pixels[0, 0, -1] for pixels in plain)


def test_the_middle() -> None:
    assert {left_column(Transform(10, "center")(WIDE, n, 0)) for n in range(20)} == {10}


@pytest.mark.parametrize("size", [(31, 100), (10, 10), (7, 8), (3, 50)])
def test_any_size_becomes_a_square(size: tuple[int, int]) -> None:
    assert Transform(7)(WIDE.resize(size), 0, 0).shape == (3, 7, 7)


def test_pixels_are_signed() -> None:
    assert Transform(5)(Image.new("RGB", (10, 10), "white"), 0, 0).unique().tolist() == [1.0]
    assert Transform(10)(Image.new("RGB", (10, 10)), 0, 0).unique().tolist() == [-1.0]
