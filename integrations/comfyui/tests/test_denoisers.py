"""ComfyUI's denoisers as coroutines, against their own forward passes and diffusers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

from afa.denoisers import Feature, discover_sites, run_alone, run_lockstep
from afa.denoisers.sites import family_of
from integrations.comfyui.denoisers.families import comfy_family
from integrations.comfyui.tests.models import KINDS, POOLED, call_of, denoiser, twin_of


def own_forward(model: Any, kind: str, call: dict[str, Any]) -> torch.Tensor:
    given = {key: call[key] for key in ("y", "guidance", "control") if key in call}
    x, timestep, context = call["sample"], call["timestep"], call["encoder_hidden_states"]
    return model(x, timestep, context=context, transformer_options={}, **given)


def twin_arguments(kind: str, call: dict[str, Any], count: int = 1) -> dict[str, Any]:
    """The same arguments for diffusers' denoiser, with texts of several experts."""
    x, text = call["sample"], call["encoder_hidden_states"]
    given = {"timestep": call["timestep"], "encoder_hidden_states": text}
    if kind in ("sd15", "sdxl"):
        given["sample"] = x
    if kind == "sdxl":  # ComfyUI embeds the size conditions before the call
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(x))
        pooled = call["y"][:, : count * POOLED]
        embedded = Timestep(256)(sizes.flatten()).reshape(len(x), -1)
        call["y"] = torch.cat([pooled, embedded], -1)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    if kind in ("flux", "sd3"):
        given |= {"hidden_states": x, "pooled_projections": call["y"]}
    if kind == "flux":
        batch, channels, height, width = x.shape
        halves = (height // 2, width // 2)
        rows, columns = torch.meshgrid(*map(torch.arange, halves), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
        packed = x.reshape(batch, channels, halves[0], 2, halves[1], 2).permute(0, 2, 4, 1, 3, 5)
        given["hidden_states"] = packed.reshape(batch, halves[0] * halves[1], 4 * channels)
        given |= {"img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3)}
        given["guidance"] = call["guidance"]
    return given


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_coroutine_is_comfyuis_forward(kind: str, size: int) -> None:
    model, call = denoiser(kind), call_of(kind, size=size)
    expected = own_forward(model, kind, call)
    assert expected.std() > 0.1
    family = comfy_family(model).family
    assert torch.equal(run_alone(family.blocks(model, **call)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_those_of_diffusers(kind: str) -> None:
    model = denoiser(kind)
    family = comfy_family(model).family  # registers it
    assert family_of(model) is family
    assert discover_sites(model) == discover_sites(twin_of(kind, model))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_diffusers(kind: str) -> None:
    model, call = denoiser(kind), call_of(kind)
    twin, given = twin_of(kind, model), twin_arguments(kind, call)
    features: dict[str, Feature] = {}

    def note(listed: Sequence[Feature]) -> Any:
        features[listed[0].site] = listed[0]
        return listed[0].hidden

    run_lockstep([comfy_family(model).family.blocks(model, **call)], note)
    own = dict(features)
    run_lockstep([family_of(twin).blocks(twin, **given)], note)
    assert list(own) == list(features)
    for site, feature in features.items():
        size = float(feature.hidden.abs().max())
        torch.testing.assert_close(own[site].hidden, feature.hidden, rtol=1e-5, atol=1e-5 * size)
        torch.testing.assert_close(own[site].temb, feature.temb, rtol=1e-5, atol=1e-5)
