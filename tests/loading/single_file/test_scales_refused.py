"""Files of float8 weights whose scales are missing, misplaced or described wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import afa
from afa.denoisers.packed import packed_layers
from tests.loading.single_file.test_load import made
from tests.loading.single_file.test_scaled_fp8 import written
from tests.quantised import Layout, scaled
from tests.refusal import refusal
from tests.single_file import original_layout

pytestmark = pytest.mark.slow

_UNET = "model.diffusion_model."
_ROTATED = '{"format": "float8_e4m3fn", "full_precision_matrix_mult": true, "convrot": true}'
_FIRST = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def _broken(change: Callable[[dict[str, Tensor]], Any], layout: Layout, file: Path) -> Path:
    """A file of scaled weights with a change that loses or contradicts a scale."""
    pipeline = made("1.5", file.parent)
    found, metadata, _ = scaled(original_layout(pipeline), layout)
    change(found)
    return written(found, file, metadata)


@pytest.mark.parametrize(
    ("layout", "change", "code"),
    [
        ("scale_weight", lambda t: t.pop(f"{_FIRST}.scale_weight"), "AFA-LOAD-120"),
        ("comfy_quant", lambda t: t.pop(f"{_FIRST}.weight_scale"), "AFA-LOAD-120"),
        ("metadata", lambda t: t.pop(f"{_FIRST}.weight_scale"), "AFA-LOAD-120"),
        ("metadata", lambda t: t.pop(f"{_FIRST}.weight"), "AFA-LOAD-110"),
        ("plain", lambda t: t.update({f"{_UNET}scaled_fp8": torch.zeros(2)}), "AFA-LOAD-120"),
        ("scale_weight", lambda t: t.pop(f"{_FIRST}.weight"), "AFA-LOAD-110"),
        (
            "scale_weight",
            lambda t: t.update({f"{_FIRST}.weight": t[f"{_FIRST}.weight"].float()}),
            "AFA-LOAD-110",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.weight_scale": torch.ones(2, 2)}),
            "AFA-LOAD-110",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.scale_weight": torch.ones(())}),
            "AFA-LOAD-110",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
            "AFA-LOAD-111",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.comfy_quant": _text(_ROTATED)}),
            "AFA-LOAD-111",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.comfy_quant": _text('{"format": "nvfp4"}')}),
            "AFA-LOAD-112",
        ),
        (
            "comfy_quant",
            lambda t: t.update({f"{_FIRST}.comfy_quant": _text('{"format": "float8_e5m2"}')}),
            "AFA-LOAD-113",
        ),
        (
            "scale_weight",
            lambda t: t.update({f"{_FIRST}.scale_weight": torch.tensor(float("nan"))}),
            "AFA-LOAD-114",
        ),
        (
            "plain",
            lambda t: t.update({f"{_FIRST}.weight": torch.ones(16, 16, dtype=torch.int8)}),
            "AFA-LOAD-104",
        ),
        (
            "plain",
            lambda t: t.update({f"{_FIRST}.weight_scale_inv": torch.ones(1, 1)}),
            "AFA-LOAD-104",
        ),
    ],
)
def test_lost_and_contradicting_scales(
    layout: Layout, change: Callable[[dict[str, Tensor]], Any], code: str, tmp_path: Path
) -> None:
    file = _broken(change, layout, tmp_path / "a.safetensors")
    with refusal(code, "a.safetensors"):
        afa.load_pipeline([file], config=tmp_path / "1.5-0")


def _text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "AFA-LOAD-111"),
        ("[]", "AFA-LOAD-111"),
        (json.dumps({"layers": {_FIRST: {}}}), "AFA-LOAD-111"),
        (json.dumps({"layers": {_FIRST: "mxfp8"}}), "AFA-LOAD-112"),
        (json.dumps({"layers": {"gone": "float8_e4m3fn"}}), "AFA-LOAD-113"),
    ],
)
def test_metadata_must_describe_the_tensors(content: str, code: str, tmp_path: Path) -> None:
    found, _, _ = scaled(original_layout(made("1.5", tmp_path)), "metadata")
    file = written(found, tmp_path / "a.safetensors", {"_quantization_metadata": content})
    with refusal(code, "a.safetensors"):
        afa.load_pipeline([file], config=tmp_path / "1.5-0")


def test_metadata_may_name_layers_without_prefix_and_formats_alone(tmp_path: Path) -> None:
    found, metadata, _ = scaled(original_layout(made("1.5", tmp_path)), "metadata")
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    short = {name.removeprefix(_UNET): own["format"] for name, own in layers.items()}
    content = {"_quantization_metadata": json.dumps({"layers": short})}
    file = written(found, tmp_path / "a.safetensors", content)
    unet = afa.load_pipeline([file], config=tmp_path / "1.5-0").unet
    assert packed_layers(unet.experts[0])
