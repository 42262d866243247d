"""Per-block weights land where they are meant to, and the web UIs' presets mean what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from afa.denoisers.unet_names import parameter_sites
from afa.merging import PRESETS, BlockWeights
from afa.merging.in_memory import merge_models
from afa.merging.parts import block_keys
from afa.merging.presets import read_preset
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline, tiny_unet


def filled(unet: UNet2DConditionModel, value: float) -> UNet2DConditionModel:
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(value)
    return unet


def test_every_site_gets_its_own_weights() -> None:
    experts = [filled(tiny_unet(), float(value)) for value in (0, 1)]
    sites = parameter_sites(experts[0].state_dict())
    second = {site: n / 100 for n, site in enumerate(sorted(set(sites.values())))}
    method = BlockWeights({site: [1 - w, w] for site, w in second.items()})
    for name, tensor in merge_models(experts, method).state_dict().items():
        torch.testing.assert_close(tensor, torch.full_like(tensor, second[sites[name]]))


def test_what_is_not_named_is_merged_uniformly_or_by_default() -> None:
    experts = [filled(tiny_unet(), float(value)) for value in (0, 1, 2)]
    merged = merge_models(experts, BlockWeights({"mid": [0, 0, 1]})).state_dict()
    assert merged["mid_block.resnets.0.conv1.bias"][0] == 2
    torch.testing.assert_close(merged["conv_in.bias"][0], torch.tensor(1.0))
    method = BlockWeights({"mid": [0, 0, 1], "default": [1, 0, 0]})
    assert merge_models(experts, method).state_dict()["conv_in.bias"][0] == 0


def stable_diffusion() -> list[str]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    others = ["text_encoder.final_layer_norm.bias", "vae.quant_conv.bias", "foo"]
    return [*(f"unet.{name}" for name in unet.state_dict()), *others]


@pytest.mark.parametrize("spelling", ["text", "numbers"])
def test_26_numbers_are_the_web_uis(spelling: str) -> None:
    numbers = [0.9, *(n / 100 for n in range(25))]
    given = ", ".join(map(str, numbers)) if spelling == "text" else numbers
    method = BlockWeights(given).fit(stable_diffusion(), 2)
    zero, one = torch.zeros(1), torch.ones(1)
    for name, expected in (
        ("unet.conv_in.bias", 0.0),
        ("unet.down_blocks.0.downsamplers.0.conv.bias", 0.03),
        ("unet.mid_block.resnets.0.conv1.bias", 0.12),
        ("unet.up_blocks.0.upsamplers.0.conv.bias", 0.15),
        ("unet.conv_out.bias", 0.24),
        ("text_encoder.final_layer_norm.bias", 0.9),
        ("vae.quant_conv.bias", 0.9),
        ("foo", 0.9),
    ):
        merged = method.merge(name, [zero, one], None)
        torch.testing.assert_close(merged, torch.tensor([expected]))


def test_presets_as_published() -> None:
    assert all(len(weights) == 26 for weights in PRESETS.values())
    assert PRESETS["WRAP08"] == (0, 1, 1, 1, 1, *[0] * 17, 1, 1, 1, 1)
    assert PRESETS["OUT12_5"] == (*[0] * 13, 0.5, *[1] * 12)
    assert PRESETS["RING10_3"] == (*[0] * 7, *[1] * 5, 0, 0, 0, *[1] * 5, *[0] * 6)
    for name, block, published in (
        ("GRAD_V", 1, 0.9166666667),
        ("GRAD_A", 7, 0.5833333333),
        ("SMOOTHSTEP", 2, 0.0196759259259259),
        ("REVERSE-SMOOTHSTEP", 4, 0.925925925925926),
        ("SMOOTHSTEP*3", 16, 0.222222222222222),
        ("R_SMOOTHSTEP*4", 23, 0.979745370370369),
        ("SMOOTHSTEP/2", 11, 0.980324074074074),
        ("R_SMOOTHSTEP/3", 2, 0.84375),
        ("COSINE", 1, 0.995722430686905),
        ("TRUE_CUBIC_HERMITE", 1, 0.199031876929012),
        ("FAKE_REVERSE_CUBIC_HERMITE", 23, 0.157576195987653),
    ):
        assert PRESETS[name][1 + block] == pytest.approx(published, abs=1e-9), name
    assert read_preset(" grad_v ") == PRESETS["GRAD_V"]


def test_single_files_have_the_same_keys(tmp_path: Path) -> None:
    names = list(original_layout(tiny_pipeline(tmp_path)))
    keys = block_keys([*names, "model_ema.decay", "model.diffusion_model.foo.bias"])
    assert set(keys) == set(names)
    assert keys["cond_stage_model.transformer.text_model.final_layer_norm.bias"] == "text_encoder"
    assert keys["first_stage_model.quant_conv.bias"] == "vae"
    assert keys["model.diffusion_model.time_embed.0.bias"] == "conv_in"
    assert keys["model.diffusion_model.out.2.bias"] == "conv_out"


@pytest.mark.parametrize(
    ("weights", "num_experts", "code", "value"),
    [
        ("GRAD_V", 2, "AFA-MERGE-004", "25 .* 19: conv_in, down.0.0"),
        ("FLAT_25", 3, "AFA-MERGE-003", "got 3"),
        ({"mid": [0.5, 0.5]}, 3, "AFA-MERGE-017", r"3 .* \[0.5, 0.5\]"),
        ({"middle": [0.5, 0.5]}, 2, "AFA-MERGE-005", "'middle', .* 'mid'"),
        ({"up.9.9": [0.5, 0.5]}, 2, "AFA-MERGE-005", "'up.9.9', .* 'up[.]"),
    ],
)
def test_weights_that_do_not_fit(weights: object, num_experts: int, code: str, value: str) -> None:
    names = [f"unet.{name}" for name in tiny_unet().state_dict()]
    with refusal(code, value):
        BlockWeights(weights).fit(names, num_experts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "code", "value"),
    [
        ("GRAD_W", "AFA-MERGE-030", "'GRAD_W'.* 'GRAD_[AV]'"),
        ("0, 1", "AFA-MERGE-031", "26 .* got 2.* base alpha"),
        ([0.5] * 25, "AFA-MERGE-031", "26 .* got 25.* base alpha"),
        ({}, "AFA-MERGE-001", "'default'"),
        ({"mid": [0.5, 0.6]}, "AFA-MERGE-016", r"\[0.5, 0.6\] .* 1.1"),
    ],
)
def test_weights_that_cannot_be(weights: object, code: str, value: str) -> None:
    with refusal(code, value):
        BlockWeights(weights)  # type: ignore[arg-type]


def test_unfitted_weights_do_not_guess() -> None:
    with refusal("AFA-MERGE-002"):
        BlockWeights({"mid": [1.0]}).merge("unet.conv_in.bias", [torch.ones(1)], None)


def test_transformers_have_the_keys_of_their_folders() -> None:
    names = [
        "model.diffusion_model.double_blocks.0.img_mlp.0.weight",
        "model.diffusion_model.img_in.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "vae.decoder.conv_in.weight",
    ]
    expected = ["transformer", "transformer", "text_encoder", "text_encoder_2", "vae"]
    assert block_keys(names) == dict(zip(names, expected, strict=True))
    folder = ["transformer.x_embedder.weight", "text_encoder_2.shared.weight"]
    assert list(block_keys(folder).values()) == ["transformer", "text_encoder_2"]
    names[:2] = ["joint_blocks.0.x_block.attn.qkv.weight", "pos_embed"]
    assert block_keys(names)[names[3]] == "text_encoder_3"
    weights = BlockWeights({"transformer": [1.0, 0.0], "default": [0.5, 0.5]}).fit(names, 2)
    ones = [torch.ones(1), torch.zeros(1)]
    assert weights.merge(names[1], ones, None).item() == 1.0
    assert weights.merge(names[2], ones, None).item() == 0.5
