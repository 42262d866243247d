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
from integrations.comfyui.denoisers.flux import flux_arguments, flux_blocks
from integrations.comfyui.tests.models import KINDS, POOLED, call_of, denoiser, twin_of
from tests.refusal import refusal


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


def controls(kind: str) -> dict[str, list[Any]]:
    """Residuals of a ControlNet for the tiny denoiser, one of them missing."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    if kind == "flux":
        return {"input": [random(16, 32), None], "output": [None, random(16, 32)]}
    if kind == "sd3":
        return {"output": [random(16, 128)]}
    return {
        "input": [random(64, 4, 4), None],
        "middle": [random(64, 4, 4)],
        "output": [random(64, 4, 4), random(32, 4, 4), random(32, 8, 8)],
    }


def copied(control: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: list(listed) for key, listed in control.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_added_as_by_comfyui(kind: str) -> None:
    model, call, control = denoiser(kind), call_of(kind), controls(kind)
    family = comfy_family(model).family
    plain = own_forward(model, kind, call)
    expected = own_forward(model, kind, {**call, "control": copied(control)})
    assert not torch.equal(expected, plain)
    for _ in range(2):  # and the residuals are left as they were
        came = run_alone(family.blocks(model, **call, control=control))
        assert torch.equal(came, expected)
    together = run_lockstep(
        [family.blocks(model, **call, control=control) for _ in range(3)],
        lambda features: features[1].hidden,
    )
    assert torch.equal(together, expected)


def replaced(given: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A patch in the place of a block: the block, on a changed picture."""
    out = extra["original_block"]({**given, "img": given["img"] * 1.1})
    return {**out, "img": out["img"] + given["vec"][:, None].mean(-1, keepdim=True)}


def attention(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A patch of attention that depends on where it is called."""
    place = options["transformer_index"] + options["block_index"] + len(options["block"][0])
    return q * (1 + 0.1 * place), k, v


def in_place(hidden: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    hidden[:, :4] *= 1.5 + options["block"][1]
    return hidden


PATCHES: dict[str, dict[str, Any]] = {
    "flux": {
        "patches": {
            "post_input": [lambda given: {**given, "img": given["img"] * 1.2, "txt": given["txt"]}]
        },
        "patches_replace": {"dit": {("double_block", 1): replaced, ("single_block", 0): replaced}},
    },
    "sd3": {"patches_replace": {"dit": {("double_block", 0): replaced}}},
    "sd15": {
        "patches": {
            "attn1_patch": [attention],
            "attn2_patch": [attention],
            "emb_patch": [lambda emb, channels, options: emb * 1.1],
            "input_block_patch": [in_place],
            "input_block_patch_after_skip": [in_place],
            "output_block_patch": [lambda h, skip, options: (in_place(h, options), skip * 1.1)],
        },
        "patches_replace": {
            "attn1": {("input", 1, 0): lambda q, k, v, options: v * q.mean(-1, keepdim=True)},
            "attn2": {("middle", 0): lambda q, k, v, options: q},
        },
    },
}
PATCHES["sdxl"] = PATCHES["sd15"]


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_called_as_by_comfyui(kind: str) -> None:
    model, call, options = denoiser(kind), call_of(kind), PATCHES[kind]
    family = comfy_family(model).family
    given = {key: call[key] for key in ("y", "guidance") if key in call}
    x, timestep, context = call["sample"], call["timestep"], call["encoder_hidden_states"]
    plain = own_forward(model, kind, call)
    expected = model(x, timestep, context=context, transformer_options=dict(options), **given)
    assert not torch.equal(expected, plain)
    blocks = [family.blocks(model, **call, transformer_options=options) for _ in range(3)]
    assert torch.equal(run_lockstep(blocks, lambda features: features[2].hidden), expected)


def test_added_tokens_are_refused() -> None:
    model, call = denoiser("flux"), call_of("flux")

    def longer(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "img": torch.cat([given["img"]] * 2, 1)}

    with refusal("AFA-COMFY-030", "16 tokens"):
        options = {"patches": {"post_input": [longer]}}
        run_alone(flux_blocks(model, **call, transformer_options=options))
    with refusal("AFA-COMFY-032"):
        flux_arguments({"x": None, "ref_latents": [call["sample"]]})


def test_models_with_other_parts_are_refused() -> None:
    model: Any = denoiser("flux")
    model.params.global_modulation = True
    with refusal("AFA-COMFY-031"):
        comfy_family(model)
    model = denoiser("sd3")
    model.register_length = 2
    with refusal("AFA-COMFY-033"):
        comfy_family(model)
