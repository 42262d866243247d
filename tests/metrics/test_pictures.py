"""Preprocessing is that of transformers, read from the same file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from afa.metrics.pictures import Preprocessing, one_by_one
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

CLIP: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 24},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 20, "width": 20},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(levels.squeeze(), mode=None).convert(mode)


@pytest.mark.parametrize("size", [(24, 24), (40, 40), (30, 50), (51, 33), (10, 17)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": {"height": 18, "width": 22}},
        {"resample": 2},
        {"do_center_crop": False, "size": {"height": 16, "width": 16}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
    ],
)
def test_pixels_are_those_of_transformers(
    tmp_path: Path, size: tuple[int, int], change: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP, **change}))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
    pixels = Preprocessing.read(tmp_path / "preprocessor_config.json").pixels(picture(*size))
    torch.testing.assert_close(pixels, expected.float(), rtol=1e-5, atol=1e-5)


def test_old_files_give_sizes_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    old = {k: v for k, v in CLIP.items() if k not in ("do_rescale", "rescale_factor")}
    file.write_text(json.dumps({**old, "size": 24, "crop_size": 20}))
    assert Preprocessing.read(file) == Preprocessing(crop=(20, 20), shortest_edge=24)


def test_other_modes_become_rgb() -> None:
    grey, glass = picture(20, 20, "L"), picture(20, 20, "RGBA")
    on_white = Image.new("RGBA", glass.size, "white")
    on_white.alpha_composite(glass)
    for shown, expected in ((grey, grey.convert("RGB")), (glass, on_white.convert("RGB"))):
        assert torch.equal(
            Preprocessing.square(20).pixels(shown), Preprocessing.square(20).pixels(expected)
        )


@pytest.mark.parametrize(
    "change", [{"size": "large"}, {"image_mean": None}, {"resample": 99}, {"crop_size": {}}]
)
def test_files_that_describe_something_else(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**CLIP, **change}))
    with refusal("AFA-METRIC-014"):
        Preprocessing.read(file)


def test_features_of_no_pictures() -> None:
    with refusal("AFA-METRIC-015"):
        one_by_one([], lambda item: item)


@pytest.mark.parametrize("size", [(640, 720), (720, 640), (333, 500), (512, 768), (999, 1000)])
def test_sizes_are_those_of_torchvision_and_transformers(size: tuple[int, int]) -> None:
    """`int(224 * long / short)`: with the factor first, some sizes are one pixel short."""
    picture = Image.new("RGB", size)
    kept = Preprocessing(crop=None, shortest_edge=224)
    height, width = kept.pixels(picture).shape[1:]
    short, long = sorted(size)
    expected = (224, int(224 * long / short))
    assert sorted((width, height)) == sorted(expected)


def test_margins_of_crops_are_rounded_as_by_their_libraries() -> None:
    """Of 5 pixels to spare, torchvision leaves out 2 before the crop, of 7 it leaves out 4."""
    for spare, (rounded, floored) in {5: (2, 2), 7: (4, 3), 6: (3, 3)}.items():
        row = torch.arange(8 + spare, dtype=torch.uint8) * 10
        picture = Image.fromarray(row.repeat(8, 1).numpy(), "L").convert("RGB")
        common = {"shortest_edge": 8, "scale": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        for rounds, left in ((True, rounded), (False, floored)):
            found = Preprocessing(crop=(8, 8), rounds=rounds, **common).pixels(picture)  # type: ignore[arg-type]
            assert found[0, 0, 0] == 10 * left, (spare, rounds)
