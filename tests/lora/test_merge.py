"""Merged weights are what PEFT and diffusers make of the same file, or the formula's definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from afa.denoisers.original_names import Rows
from afa.lora.merge import merged
from tests.lora.models import assert_equal, by_diffusers, peft_lora, with_lora, write
from tests.refusal import refusal
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = ["to_q", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv"]
PATTERNS = {
    "rank_pattern": {"to_q": 3},
    "alpha_pattern": {"to_out.0": 5, "attn2.to_q": 2},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **ODD["two levels"])


# PEFT takes biases for shards of weights
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    ("targets", "options", "scale"),
    [
        (ATTENTION, {"lora_alpha": 4}, 1.0),
        (ATTENTION, {"lora_alpha": 3, "use_rslora": True}, 0.7),
        (ATTENTION, {"lora_alpha": 4, **PATTERNS}, 0.7),
        (CONVOLUTIONS, {"lora_alpha": 4}, 0.7),
        (["to_out.0", "conv1"], {"lora_alpha": 4, "lora_bias": True}, 0.7),
        (ATTENTION, {"lora_alpha": 4, "use_dora": True}, 1.0),
        (CONVOLUTIONS, {"lora_alpha": 4, "use_dora": True}, 0.7),
    ],
)
def test_as_diffusers_fuses_it(
    pipeline: Any, targets: list[str], options: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=targets, **options)
    state = peft_lora(pipeline.unet, config)
    file = write(
        tmp_path / "l.safetensors", {f"unet.{k}": t for k, t in state.items()}, config, "unet"
    )
    ours = with_lora(pipeline, file, scale).unet
    assert_equal(ours, by_diffusers(pipeline, file, scale), pipeline.unet)
    # the same in PEFT's own layout, with its configuration beside it
    raw = {f"base_model.model.{k}": t for k, t in state.items()}
    again = with_lora(pipeline, write(tmp_path / "raw.safetensors", raw, config), scale).unet
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_without_a_configuration_alpha_is_the_rank(pipeline: Any, tmp_path: Path) -> None:
    state = peft_lora(pipeline.unet, LoraConfig(r=3, target_modules=ATTENTION))
    file = write(tmp_path / "l.safetensors", {f"unet.{k}": t for k, t in state.items()})
    ours = with_lora(pipeline, file).unet
    assert_equal(ours, by_diffusers(pipeline, file), pipeline.unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    pipeline: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = peft_lora(pipeline.unet, LoraConfig(r=2, target_modules=ATTENTION))
    halves = {f"unet.{k}": t.to(dtype) for k, t in state.items()}
    whole = with_lora(
        pipeline, write(tmp_path / "w.safetensors", {k: t.float() for k, t in halves.items()})
    )
    half = with_lora(pipeline, write(tmp_path / "h.safetensors", halves))
    for key, tensor in whole.unet.state_dict().items():
        assert torch.equal(tensor, half.unet.state_dict()[key]), key


def test_a_base_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", **ODD["two levels"])
    pipeline.unet.to(torch.bfloat16)
    state = peft_lora(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))
    file = write(tmp_path / "l.safetensors", {f"unet.{k}": t.float() for k, t in state.items()})
    ours = with_lora(pipeline, file).unet.state_dict()
    key = next(k for k in state if "lora_A" in k)
    place = key.removesuffix(".lora_A.weight")
    product = state[key.replace("_A", "_B")].float() @ state[key].float()
    expected = pipeline.unet.state_dict()[f"{place}.weight"].float() + product
    assert torch.equal(ours[f"{place}.weight"], expected.bfloat16())


def test_a_core_is_three_convolutions_in_a_row() -> None:
    """LyCORIS' CP decomposition: 1 x 1, then k x k, then 1 x 1, in place of one k x k."""
    torch.manual_seed(0)
    down, mid, up = torch.randn(2, 4, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(5, 3, 1, 1)
    base, picture = torch.randn(5, 4, 3, 3), torch.randn(1, 4, 6, 6)
    tensors = {"down": down, "mid": mid, "up": up}
    [(name, new)] = merged(tensors, (Rows("conv"),), {"conv.weight": base}, 0.25, 0.5)  # type: ignore[arg-type]
    assert name == "conv.weight"
    beside = functional.conv2d(functional.conv2d(functional.conv2d(picture, down), mid), up)
    expected = functional.conv2d(picture, base) + 0.5 * 0.25 * beside
    torch.testing.assert_close(functional.conv2d(picture, new), expected, rtol=1e-4, atol=1e-4)


def test_differences_are_added_and_weights_replaced(pipeline: Any, tmp_path: Path) -> None:
    base = pipeline.unet.state_dict()
    added = {
        "lora_unet_conv_in.diff": base["conv_in.weight"],
        "lora_unet_conv_in.diff_b": base["conv_in.bias"],
        "lora_unet_conv_norm_out.w_norm": base["conv_norm_out.weight"],
        "lora_unet_conv_norm_out.b_norm": base["conv_norm_out.bias"],
    }
    file = write(tmp_path / "d.safetensors", added)
    ours = with_lora(pipeline, file, 0.5).unet.state_dict()
    for key, tensor in base.items():
        is_changed = key.startswith(("conv_in.", "conv_norm_out."))
        torch.testing.assert_close(ours[key], tensor * (1.5 if is_changed else 1.0))
    product = peft_lora(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))
    whole = {f"base_model.model.{k}": t for k, t in product.items()}
    whole["base_model.model.conv_out.bias"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    config = LoraConfig(r=2, modules_to_save=["conv_out"], target_modules=["to_q"])
    file = write(tmp_path / "w.safetensors", whole, config)
    ours = with_lora(pipeline, file).unet.state_dict()
    assert ours["conv_out.bias"].tolist() == [1.0, 2.0, 3.0, 4.0]
    with refusal("AFA-LORA-003", r"0\.5", "1"):
        with_lora(pipeline, file, 0.5)


def test_norms_of_flux_are_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = PIPELINES["flux"](tmp_path / "tokenizer")
    place = "transformer.transformer_blocks.0.attn."
    tensors = {
        f"{place}to_q.lora_A.weight": torch.randn(2, 16),
        f"{place}to_q.lora_B.weight": torch.randn(16, 2),
        f"{place}norm_q.weight": torch.full((8,), 9.0),
        f"{place}norm_added_k.weight": torch.full((8,), 7.0),
    }
    file = write(tmp_path / "n.safetensors", tensors)
    ours = with_lora(pipeline, file).transformer
    assert ours.transformer_blocks[0].attn.norm_q.weight.tolist() == [9.0] * 8
    assert_equal(ours, by_diffusers(pipeline, file), pipeline.transformer)


def test_a_scale_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", **ODD["two levels"])
    pipeline.unet.to(torch.float16)
    weight = pipeline.unet.state_dict()["conv_in.weight"]
    file = write(
        tmp_path / "l.safetensors",
        {"lora_unet_conv_in.diff": torch.ones_like(weight).float() * 1e5},
    )
    with refusal("AFA-LOAD-032", r"'conv_in\.weight'", "float16"):
        with_lora(pipeline, file)
