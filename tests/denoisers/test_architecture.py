"""Configurations that build the same denoiser are equal, however they are written."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

import afa
from afa.denoisers.architecture import canonical, difference, unknown_entries
from tests.tiny import SD1, SDXL

if TYPE_CHECKING:
    from pathlib import Path

#: of the tiny Stable Diffusion: ways to write the same
SAME: list[dict[str, Any]] = [
    {"attention_head_dim": [2, 2, 2]},
    {"layers_per_block": [2, 2, 2]},
    {"transformer_layers_per_block": [1, 1, 1]},
    {
        "transformer_layers_per_block": [[1, 1], [1, 1], 1],
        "reverse_transformer_layers_per_block": [1, [1, 1, 1], [1, 1, 1]],
    },
    {"reverse_transformer_layers_per_block": [1, 1, 1]},
    {"cross_attention_dim": [16, 16, 16]},
    {"only_cross_attention": [False, False, False]},
    {"mid_block_only_cross_attention": False},
    {"time_embedding_dim": 32},
    {"act_fn": "swish"},
    {"act_fn": "SiLU"},
    {"down_block_types": [f"UNetRes{name}" for name in SD1["down_block_types"]]},
    {"num_attention_heads": None, "dropout": 0.1, "sample_size": 64, "upcast_attention": True},
    {"addition_embed_type_num_heads": 8, "projection_class_embeddings_input_dim": 7},
    {"resnet_out_scale_factor": 1, "mid_block_scale_factor": 1.0, "freq_shift": 0.0},
    {"an_entry_of_a_later_version": None, "_diffusers_version": "9.9"},
]
OTHER: list[dict[str, Any]] = [
    {"attention_head_dim": 4},
    {"attention_head_dim": [2, 2, 4]},
    {"layers_per_block": [2, 2, 1]},
    {"transformer_layers_per_block": 2},
    {"transformer_layers_per_block": [1, 2, 1]},
    {"reverse_transformer_layers_per_block": [1, 1, 2]},
    {"only_cross_attention": True},
    {"time_embedding_dim": 64},
    {"act_fn": "gelu"},
    {"center_input_sample": True},
    {"use_linear_projection": True},
    {"mid_block_type": "UNetMidBlock2D"},
]


def built(config: dict[str, Any]) -> list[Any]:
    """What can be seen of the modules that a configuration builds."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    seen = []
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, tuple)) and key != "sample_size"
        }
        kind = type(module).__name__
        seen.append((name, kind, {} if kind == "Dropout" else plain))
    return [seen, [(name, tuple(t.shape)) for name, t in model.state_dict().items()]]


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_the_same_model_in_other_words(changes: dict[str, Any]) -> None:
    other = {**SD1, **changes}
    assert difference(SD1, other, UNet2DConditionModel) is None
    assert difference(other, SD1, UNet2DConditionModel) is None
    free = {"dropout", "upcast_attention", "attention_head_dim"}
    if not free & changes.keys() or changes == SAME[0]:
        assert built({**SD1, **changes}) == built(SD1)


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_another_model(changes: dict[str, Any]) -> None:
    other = {**SD1, **changes}
    for pair in ((SD1, other), (other, SD1)):
        found = difference(*pair, UNet2DConditionModel)
        assert found is not None
        assert found[0] in changes
        assert found[1] != found[2]


def test_levels_without_attention_do_not_count() -> None:
    # converters write 0 or 1 where Stable Diffusion XL has no attention, and any number of heads
    ours = {**SDXL, "transformer_layers_per_block": (0, 1, 2), "attention_head_dim": (5, 2, 2)}
    assert difference(SDXL, ours, UNet2DConditionModel) is None
    theirs = {**SDXL, "transformer_layers_per_block": (0, 2, 2)}
    found = difference(SDXL, theirs, UNet2DConditionModel)
    assert found == ("transformer_layers_per_block", (1, 1, 2), (0, 2, 2))


def test_transformers_with_defaults_written_or_left_out() -> None:
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (FluxTransformer2DModel, {"in_channels": 16}, {"in_channels": 16, "out_channels": 16}),
        (FluxTransformer2DModel, {}, {"axes_dims_rope": [16, 56, 56], "guidance_embeds": False}),
        (SD3Transformer2DModel, {}, {"out_channels": None, "dual_attention_layers": []}),
        (PixArtTransformer2DModel, {}, {"use_additional_conditions": True, "sample_size": 128}),
    ]
    for model_class, first, other in cases:
        assert difference(first, other, model_class) is None, model_class
        assert difference(other, first, model_class) is None, model_class
    assert difference({}, {"guidance_embeds": True}, FluxTransformer2DModel) is not None
    assert difference({}, {"dual_attention_layers": [0]}, SD3Transformer2DModel) is not None


def test_nonsense_is_compared_as_it_is() -> None:
    forms = [
        canonical({key: value}, UNet2DConditionModel)
        for key, value in (("down_block_types", 3), ("layers_per_block", []), ("in_channels", 4))
    ]
    assert all(one != two for one, two in itertools.combinations(forms, 2))


def test_entries_of_later_versions_are_named() -> None:
    config = {"new": 3, "gone": None, "off": False, "_class_name": "x", "in_channels": 4}
    assert unknown_entries(UNet2DConditionModel, config) == ["new"]


def test_experts_written_in_two_ways_are_one_ensemble(
    experts: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(experts[1], other)
    place = other / "unet" / "config.json"
    config = json.loads(place.read_text())
    levels = len(config["block_out_channels"])
    config["attention_head_dim"] = [config["attention_head_dim"]] * levels
    del config["center_input_sample"], config["resnet_time_scale_shift"]
    place.write_text(json.dumps({**config, "an_entry_of_a_later_version": None}))
    pipeline = afa.load_pipeline([experts[0], other])
    assert len(pipeline.unet.experts) == 2
    capfd.readouterr()  # the library says that it ignores the entry
