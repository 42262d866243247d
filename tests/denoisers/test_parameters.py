"""Every parameter of a U-Net has a site, and both naming schemes say the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from afa.denoisers import discover_sites
from afa.denoisers.unet_names import ordered_sites, parameter_sites
from tests.single_file import original_layout
from tests.tiny import ODD, SD1, SD2, tiny_pipeline, tiny_unet

#: the blocks of the web UIs in their order
WEB_UI = [*(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]


@pytest.mark.parametrize("config", [SD1, SD2, *ODD.values()])
def test_sites_are_the_denoisers(config: dict[str, Any]) -> None:
    unet = tiny_unet(**config)
    names = list(unet.state_dict())
    sites = parameter_sites(names)
    assert set(sites) == set(names)
    assert ordered_sites(sites.values()) == [site.name for site in discover_sites(unet)]


def test_stable_diffusion_has_the_web_uis_25() -> None:
    with torch.device("meta"):  # the library's defaults are Stable Diffusion 1.x
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sites = parameter_sites(unet.state_dict())
    ordered = ordered_sites(sites.values())
    assert len(unet.state_dict()) == len(sites) == 686
    assert len(ordered) == len(WEB_UI)
    blocks = dict(zip(ordered, WEB_UI, strict=True))
    for name, block in (
        ("time_embedding.linear_1.bias", "IN00"),
        ("down_blocks.0.attentions.1.norm.weight", "IN02"),
        ("down_blocks.0.downsamplers.0.conv.weight", "IN03"),
        ("down_blocks.2.downsamplers.0.conv.weight", "IN09"),
        ("down_blocks.3.resnets.1.conv1.weight", "IN11"),
        ("mid_block.attentions.0.norm.weight", "M00"),
        ("up_blocks.0.resnets.0.conv1.weight", "OUT00"),
        ("up_blocks.0.upsamplers.0.conv.weight", "OUT02"),
        ("up_blocks.3.resnets.1.conv1.weight", "OUT10"),
        ("up_blocks.3.resnets.2.conv1.weight", "OUT11"),
        ("conv_norm_out.weight", "OUT11"),
        ("conv_out.bias", "OUT11"),
    ):
        assert blocks[sites[name]] == block


FOUR_LEVELS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


@pytest.mark.parametrize("config", [{}, FOUR_LEVELS, ODD["two levels"]])
def test_the_original_names_agree(config: dict[str, Any], tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path, **config)
    state = pipeline.unet.state_dict()
    sites = parameter_sites(state)
    start = "model.diffusion_model."
    original = {
        name.removeprefix(start): tensor.data_ptr()
        for name, tensor in original_layout(pipeline).items()
        if name.startswith(start)
    }
    theirs = parameter_sites(original)
    ours = {state[name].data_ptr(): site for name, site in sites.items()}
    assert len(theirs) == len(sites)
    assert {original[name]: site for name, site in theirs.items()} == ours


def test_what_is_no_unets_has_no_site() -> None:
    assert parameter_sites(["alphas_cumprod", "conv_inner.weight", "foo.down_blocks.0.bar"]) == {}
