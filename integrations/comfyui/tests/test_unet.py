"""ComfyUI's U-Net as a coroutine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

from afa.denoisers import FAMILIES, Feature, discover_sites, family_of, run_alone, run_lockstep
from afa.denoisers.unet import unet_blocks as stock
from integrations.comfyui.denoisers.unet import UNET, unet_blocks
from integrations.comfyui.tests.models import UNETS, unet, unet_call, unet_twin


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afa.denoisers.sites.FAMILIES", [*FAMILIES, UNET])


def own_forward(model: Any, call: dict[str, Any]) -> torch.Tensor:
    return model(
        call["sample"],
        call["timestep"],
        call["encoder_hidden_states"],
        call.get("y"),
        control=call.get("control"),
        transformer_options=call.get("transformer_options", {}),
    )


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("kind", UNETS)
def test_coroutine_is_comfyui_forward(kind: str, size: int) -> None:
    model, call = unet(kind), unet_call(kind, size=size)
    expected = own_forward(model, call)
    assert expected.std() > 0.1
    assert torch.equal(run_alone(unet_blocks(model, **call)), expected)


@pytest.mark.parametrize("kind", UNETS)
def test_sites_are_those_of_diffusers(kind: str) -> None:
    model = unet(kind)
    assert family_of(model) is UNET
    assert discover_sites(model) == discover_sites(unet_twin(kind, model))


@pytest.mark.parametrize("kind", UNETS)
def test_features_are_those_of_diffusers(kind: str) -> None:
    model, call = unet(kind), unet_call(kind)
    twin = unet_twin(kind, model)
    features = {}

    def note(listed: Sequence[Feature]) -> Any:
        features[listed[0].site] = listed[0]
        return listed[0].hidden

    given = {k: v for k, v in call.items() if k != "y"}
    if kind == "sdxl":  # ComfyUI embeds the size conditions before the call
        sizes = torch.tensor([[64.0, 48, 0, 8, 64, 48]] * 2)
        embedded = Timestep(256)(sizes.flatten()).reshape(2, -1)
        call["y"] = torch.cat([call["y"][:, :8], embedded], -1)
        given["added_cond_kwargs"] = {"text_embeds": call["y"][:, :8], "time_ids": sizes}
    run_lockstep([unet_blocks(model, **call)], note)
    own = dict(features)
    run_lockstep([stock(twin, **given)], note)
    assert own.keys() == features.keys()
    for site, feature in features.items():
        size = float(feature.hidden.abs().max())
        torch.testing.assert_close(own[site].hidden, feature.hidden, rtol=1e-5, atol=1e-5 * size)
        torch.testing.assert_close(own[site].temb, feature.temb, rtol=1e-5, atol=1e-5)
