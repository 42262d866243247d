"""Against tensors made by running the published code (Tenvence/afa, commit e42173c)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional as F

from afa.aggregators import SABWConfig
from afa.ensemble.denoiser import EnsembleDenoiser

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def oracle() -> tuple[dict, dict[str, torch.Tensor]]:
    # weights are float8 and float16 on disk; the published code ran on these values in float32
    tensors = load_file(ORACLE / "n2.safetensors")
    wide = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    return json.loads((ORACLE / "n2.json").read_text()), wide


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def test_output_maps_and_gradients(oracle: tuple[dict, dict[str, torch.Tensor]]) -> None:
    facts, tensors = oracle
    experts = []
    for n in range(facts["num_experts"]):
        experts.append(UNet2DConditionModel(**facts["unet_config"]).eval())
        experts[-1].load_state_dict(part(tensors, f"unet.{n}."))
    settings = facts["aggregator_config"][0]
    ensemble: Any = EnsembleDenoiser(
        experts,
        SABWConfig(
            hidden_size=settings["hidden_size"],
            num_layers=settings["num_layers"],
            num_heads=settings["num_attn_heads"],
            hidden_ratio=None,
            min_scale=1,
        ),
    )
    assert len(ensemble.sites) == len(facts["points"])
    for n, rule in enumerate(ensemble.aggregators):
        rule.load_state_dict(part(tensors, f"aggregator.{n}."))

    sample, timestep = tensors["input.sample"], tensors["input.timestep"]
    texts = tensors["input.encoder_hidden_states"]
    for n, expert in enumerate(experts):
        alone = expert(sample, timestep, texts[n]).sample
        torch.testing.assert_close(alone, tensors[f"stock.sample.{n}"], rtol=0, atol=1e-5)

    maps: dict[str, torch.Tensor] = {}
    ensemble.on_weights = lambda _, site, weights: maps.update({site: weights})
    output = ensemble(sample, timestep, torch.cat(list(texts), dim=-1)).sample
    torch.testing.assert_close(output, tensors["output.sample"], rtol=0, atol=1e-5)
    for n, site in enumerate(ensemble.sites):
        expected = tensors[f"output.attn_map.{n}"]
        torch.testing.assert_close(maps[site.name], expected, rtol=0, atol=1e-5)

    loss = F.mse_loss(output, tensors["input.target"])
    torch.testing.assert_close(loss.item(), facts["loss"], rtol=1e-5, atol=0)
    loss.backward()
    for n, rule in enumerate(ensemble.aggregators):
        expected = tensors[f"grad.aggregator.{n}.conv_out.weight"]
        error = (rule.conv_out.weight.grad - expected).norm() / expected.norm()
        assert error < 1e-4, (n, error)
