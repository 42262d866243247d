"""AFA Steer, AFA Speed and recorded weights, against afa with diffusers' denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_pag
from comfy_extras.nodes_custom_sampler import Guider_DualCFG

from afa.ensemble.caching.plan import save_plan
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.recording import record_weights
from integrations.comfyui.ensemble import ensemble_model, runner_of, with_settings
from integrations.comfyui.settings import Settings
from integrations.comfyui.tests.models import patcher
from integrations.comfyui.tests.test_ensemble import conditioning, sample, saved
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal

STEPS: dict[str, Any] = {"steps": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ensemble"


@pytest.fixture
def experts() -> list[Any]:
    return [patcher("sd15", seed) for seed in range(3)]


@pytest.fixture
def twin(experts: list[Any], folder: Path) -> EnsembleDenoiser:
    return saved("sd15", experts, folder)


def calls_of(model: Any) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """The arguments and results of the denoiser's calls while a picture is sampled."""
    seen: list[tuple[tuple[Any, ...], torch.Tensor]] = []

    def spy(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((args, executor(*args, **kwargs)))
        return seen[-1][1]

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
    assert sample(clone, 3, **STEPS).isfinite().all()
    return seen


SETTINGS: dict[str, dict[str, Any]] = {
    "bias": {"bias": {"expert-0": {"down": 1.5, "mid": 1.5, "up": 1.5}, "2": {"up": -2.0}}},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "plan": {"plan": "plan.json"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_afas(
    name: str, experts: list[Any], twin: EnsembleDenoiser, folder: Path, tmp_path: Path
) -> None:
    model, settings = ensemble_model(experts, folder), dict(SETTINGS[name])
    if name == "plan":
        settings["plan"] = tmp_path / "plan.json"
        save_plan(
            plan_of(twin, {}, {"mid": [0, 2], "up.0.0": [1], "conv_in": [2]}), settings["plan"]
        )
    plain, calls = calls_of(model), calls_of(with_settings(model, **settings))
    Settings(**settings).apply(twin)
    text = calls[0][0][2]  # one object in all calls, as from diffusers' pipelines
    with torch.inference_mode():
        for (x, timestep, context, *_), prediction in calls:
            assert torch.equal(context, text)
            expected = twin(x, timestep, text, return_dict=False)[0]
            torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    assert any(
        not torch.equal(one, other) for (_, one), (_, other) in zip(plain, calls, strict=True)
    )


def test_settings_of_one_clone_do_not_change_another(experts: list[Any], folder: Path) -> None:
    experts_twin = saved("sd15", experts, folder)
    assert isinstance(experts_twin, EnsembleDenoiser)
    model = ensemble_model(experts, folder)
    expected = sample(model, 3, **STEPS)
    steered = with_settings(model, **SETTINGS["bias"])
    fast = with_settings(steered, preset="fast")
    assert runner_of(fast).settings.bias == SETTINGS["bias"]["bias"]
    first = sample(steered, 3, **STEPS)
    assert not torch.equal(first, expected)
    assert not torch.equal(sample(fast, 3, **STEPS), first)
    assert torch.equal(sample(model, 3, **STEPS), expected)
    assert torch.equal(sample(steered, 3, **STEPS), first)


def test_unknown_expert_is_refused(experts: list[Any]) -> None:
    with refusal("AFA-ENSEMBLE-055", "model_1"):
        with_settings(ensemble_model(experts, None), bias={"model_4": {"up": 1.0}})


def test_settings_of_a_plain_model_are_refused(experts: list[Any]) -> None:
    with refusal("AFA-COMFY-009"):
        with_settings(experts[0], preset="fast")


def guided(model: Any, guider: Any) -> torch.Tensor:
    """Sample with a guider of ComfyUI."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


def test_only_the_positive_prompt_is_recorded(experts: list[Any], folder: Path) -> None:
    """Whatever the order of ComfyUI's conditions, and however often a guider calls."""
    saved("sd15", experts, folder)
    model = ensemble_model(experts, folder, Settings(records=True))
    recording = runner_of(model).recording
    positive, middle, negative = (conditioning("sd15", 3, seed) for seed in (2, 6, 3))
    alone = comfy.samplers.CFGGuider(model)
    alone.set_conds(positive, negative)
    alone.set_cfg(3.0)
    expected = recording.of(guided(model, alone)).steps[0].weights
    dual = Guider_DualCFG(model)
    dual.set_conds(positive, middle, negative)
    dual.set_cfg(2.0, 3.0)
    found = recording.of(guided(model, dual))
    assert len(found.steps) == 3
    for site, weights in found.steps[0].weights.items():
        torch.testing.assert_close(weights, expected[site], rtol=1e-5, atol=1e-5)
    pag = nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]
    found = recording.of(sample(pag, 3))
    assert len(found.steps) == 3
    for site, weights in found.steps[0].weights.items():
        torch.testing.assert_close(weights, expected[site], rtol=1e-5, atol=1e-5)


def test_weights_of_areas(experts: list[Any]) -> None:
    model = ensemble_model(experts, None, Settings(records=True))
    recording = runner_of(model).recording
    whole = conditioning("sd15", 3, 2)
    area = nodes.ConditioningSetArea().append(whole, 32, 32, 16, 16, 0.8)[0]
    found = recording.of(sample(model, 3, positive=[*whole, *area]))
    assert [step.weights["conv_in"].shape[-1] for step in found.steps] == [8, 8, 8]
    with refusal("AFA-COMFY-035"):
        recording.of(sample(model, 3, positive=area))


def test_nothing_stays_on_the_device(experts: list[Any], twin: Any, folder: Path) -> None:
    del twin
    model = with_settings(ensemble_model(experts, folder), preset="fast")
    runner = runner_of(model)
    sample(model, 3, **STEPS)
    assert list(runner.denoiser.loops) == []
    assert len(runner.denoiser.lowered) == 0
    with pytest.raises(RuntimeError, match="stop"):
        sample(model, 3, callback=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert list(runner.denoiser.loops) == []


def test_aggregators_are_moved_as_a_whole(
    experts: list[Any], twin: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the device of the sampling, and back; freed memory before. The device here is meta."""
    del twin
    model = ensemble_model(experts, folder)
    aggregators = runner_of(model).denoiser.aggregators
    before = {name: p.clone() for name, p in aggregators.named_parameters()}
    freed: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *a: freed.append(a))
    meta, cpu = torch.device("meta"), torch.device("cpu")
    runner_of(model)._move_aggregators(cpu)
    assert not freed
    runner_of(model)._move_aggregators(meta)
    assert freed == [(sum(4 * p.numel() for p in before.values()), meta)]
    assert {p.device for p in aggregators.parameters()} == {meta}


def test_recorded_weights_are_afas(
    experts: list[Any], twin: EnsembleDenoiser, folder: Path
) -> None:
    model = ensemble_model(experts, folder, Settings(records=True))
    calls = calls_of(model)
    latent = sample(model, 3, **STEPS)
    other = sample(model, 3, **{**STEPS, "cfg": 1.0})
    with torch.inference_mode(), record_weights(twin) as record:
        for (x, timestep, context, *_), _ in calls:
            twin(x, timestep, context)
    found = runner_of(model).recording.of(latent)
    assert len(found.steps) == len(record.steps) == STEPS["steps"]
    (halves,) = {tuple(args[5]["cond_or_uncond"]) for args, _ in calls}
    positive = slice(0, 2) if halves == (0, 1) else slice(2, 4)
    for own, expected in zip(found.steps, record.steps, strict=True):
        assert own.timestep == expected.timestep
        assert own.weights.keys() == expected.weights.keys()
        for site, weights in own.weights.items():
            asked = expected.weights[site][positive]
            torch.testing.assert_close(weights.float(), asked, rtol=1e-3, atol=1e-3)
    assert len(runner_of(model).recording.of(other).steps) == STEPS["steps"]
    with refusal("AFA-COMFY-012"):
        runner_of(model).recording.of(latent + 1)
