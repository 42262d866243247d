"""ComfyUI's own nodes before and after AFA Ensemble.

With one expert, a node has the effect that it has on that MODEL, bit for bit. With three equal
experts fused by the mean, it has the same effect up to rounding; a node that writes to a feature in
place, or is applied to one expert only, would change the result. With three different experts, a
node after AFA Ensemble has the effect of that node on every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_differential_diffusion,
    nodes_easycache,
    nodes_freelunch,
    nodes_fresca,
    nodes_hypertile,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_sag,
    nodes_tcfg,
    nodes_tomesd,
)

from integrations.comfyui.ensemble import ensemble_model, with_settings
from integrations.comfyui.tests.models import lora_of, patcher
from integrations.comfyui.tests.test_ensemble import sample
from tests.refusal import refusal

Node = Callable[[Any], Any]


def _lora(model: Any, strength: float = 0.8) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora_of(model), strength, 0)[0]


def _function_wrapper(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_unet_function_wrapper(
        lambda apply, given: 0.9 * apply(given["input"], given["timestep"], **given["c"])
    )
    return clone


#: patches of the denoiser, which can be on one expert or on all
PATCHES: dict[str, Node] = {
    "LoRA": _lora,
    "FreeU": lambda m: nodes_freelunch.FreeU().patch(m, 1.3, 1.4, 0.9, 0.2)[0],
    "FreeU_V2": lambda m: nodes_freelunch.FreeU_V2().patch(m, 1.3, 1.4, 0.9, 0.2)[0],
    "HyperTile": lambda m: nodes_hypertile.HyperTile.execute(m, 16, 2, 1, False)[0],
    "TomePatchModel": lambda m: nodes_tomesd.TomePatchModel.execute(m, 0.5)[0],
    "PatchModelAddDownscale": lambda m: nodes_model_downscale.PatchModelAddDownscale.execute(
        m, 1, 2.0, 0.0, 0.7, True, "bicubic", "bicubic"
    )[0],
}
#: nodes that change the sampling, which come after the ensemble
SAMPLING: dict[str, Node] = {
    "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
    "APG": lambda m: nodes_apg.APG.execute(m, 1.0, 15.0, 0.5)[0],
    "CFGZeroStar": lambda m: nodes_cfg.CFGZeroStar.execute(m)[0],
    "TCFG": lambda m: nodes_tcfg.TCFG.execute(m)[0],
    "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 2)[0],
    "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m)[0],
    "DifferentialDiffusion": lambda m: nodes_differential_diffusion.DifferentialDiffusion.execute(
        m, 1.0
    )[0],
    "SelfAttentionGuidance": lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)[0],
    "PerturbedAttentionGuidance": lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)[0],
    "EasyCache": lambda m: nodes_easycache.EasyCacheNode.execute(m, 0.5, 0.1, 0.95, False)[0],
    "LazyCache": lambda m: nodes_easycache.LazyCacheNode.execute(m, 0.5, 0.1, 0.95, False)[0],
    "model_function_wrapper": _function_wrapper,
}
ALL = {**PATCHES, **SAMPLING}
#: nodes that draw random numbers at every call of a denoiser, others for each expert
RANDOM = {"HyperTile", "TomePatchModel"}
#: settings of ComfyUI's sampler with which a node has an effect on tiny pictures
STEPS: dict[str, Any] = {"steps": 6}


@pytest.mark.parametrize("name", ALL)
def test_one_expert(name: str) -> None:
    model, node = patcher("sd15"), ALL[name]
    plain, expected = sample(model, **STEPS), sample(node(model), **STEPS)
    if name != "DifferentialDiffusion":  # needs a mask
        assert not torch.equal(plain, expected), "the node has no effect here"
    after = sample(node(ensemble_model([model], None)), **STEPS)
    assert torch.equal(after, expected)
    if name in PATCHES:
        assert torch.equal(sample(ensemble_model([node(model)], None), **STEPS), expected)


@pytest.mark.parametrize("name", sorted(ALL.keys() - RANDOM))
def test_equal_experts(name: str) -> None:
    models, node = [patcher("sd15") for _ in range(3)], ALL[name]
    expected = sample(node(models[0]), **STEPS)
    after = sample(node(ensemble_model(models, None)), **STEPS)
    size = float(expected.abs().max())
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("name", PATCHES)
def test_different_experts(name: str) -> None:
    models, node = [patcher("sd15", seed) for seed in range(3)], PATCHES[name]
    before = sample(ensemble_model([node(model) for model in models], None), **STEPS)
    after = sample(node(ensemble_model(models, None)), **STEPS)
    assert torch.equal(after, before)
    mixed = ensemble_model([models[0], node(models[1]), models[2]], None)
    if name == "PatchModelAddDownscale":  # features of one expert alone would be smaller
        with refusal("AFA-ENSEMBLE-064", "expert 1"):
            sample(mixed, **STEPS)
        return
    one = sample(mixed, **STEPS)
    assert not torch.equal(one, before)
    assert not torch.equal(one, sample(ensemble_model(models, None), **STEPS))


def test_loras_after_in_turn() -> None:
    """One ensemble alone and with two LoRAs, as in one workflow that is queued again and again."""
    models = [patcher("sd15", seed) for seed in range(3)]
    ensemble = ensemble_model(models, None)
    loras = [_lora(ensemble), _lora(ensemble, -0.5), ensemble]
    before = [
        ensemble_model([_lora(m) for m in models], None),
        ensemble_model([_lora(m, -0.5) for m in models], None),
        ensemble_model(models, None),
    ]
    expected = [sample(each) for each in before]
    for _ in range(2):
        for each, asked in zip(loras, expected, strict=True):
            assert torch.equal(sample(each), asked)


def test_patches_with_tensors_are_moved_for_all_experts() -> None:
    """Hypernetworks are such: ComfyUI moves those of the models that it loads itself."""

    class Patch:
        def __init__(self) -> None:
            self.moved: list[Any] = []

        def to(self, place: Any) -> Patch:
            self.moved.append(place)
            return self

        def __call__(self, q: Any, k: Any, v: Any, options: Any) -> Any:
            assert self.moved[:2] == [torch.device("cpu"), torch.float32]
            return q, k, v

    checkpoint = patcher("sd15")
    models = [checkpoint.clone(), patcher("sd15", 1), checkpoint.clone()]
    for model in models:
        model.set_model_attn1_patch(Patch())
    ensemble = ensemble_model(models, None)
    sample(ensemble)
    sample(_lora(ensemble))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_cache_keeps_calls_of_guidance_apart(cfg: float) -> None:
    """A node that calls the denoiser once more at each step, and does not use what it gets."""
    models = [patcher("sd15", seed) for seed in range(2)]

    def extra(model: Any) -> Any:
        def call(given: dict[str, Any]) -> torch.Tensor:
            options = comfy.model_patcher.set_model_options_patch_replace(
                given["model_options"].copy(), lambda q, k, v, o: v, "attn1", "middle", 0
            )
            again = (given["model"], [given["cond"]], given["input"], given["sigma"], options)
            comfy.samplers.calc_cond_batch(*again)
            return given["denoised"]

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(call)
        return clone

    fast = with_settings(ensemble_model(models, None), preset="fast")
    options: dict[str, Any] = {"steps": 12, "cfg": cfg}
    expected = sample(fast, **options)
    assert not torch.equal(expected, sample(ensemble_model(models, None), **options))
    assert torch.equal(sample(extra(fast), **options), expected)


def test_differential_diffusion() -> None:
    model = patcher("sd15")
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    mask = torch.linspace(0, 1, 8).expand(2, 1, 8, 8)
    options: dict[str, Any] = {"latent_image": latent, "noise_mask": mask, "steps": 6}
    node = ALL["DifferentialDiffusion"]
    expected = sample(node(model), **options)
    assert not torch.equal(expected, sample(model, **options))
    assert torch.equal(sample(node(ensemble_model([model], None)), **options), expected)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_nodes_before_are_refused(name: str) -> None:
    models = [patcher("sd15", seed) for seed in range(2)]
    for position in range(2):
        changed = [SAMPLING[name](m) if n == position else m for n, m in enumerate(models)]
        with refusal("AFA-COMFY-004", f"model_{position + 1} was changed"):
            ensemble_model(changed, None)
