"""AFA Steer, AFA Speed and recorded weights, against afa with diffusers' denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from afa.ensemble.caching.plan import save_plan
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.recording import record_weights
from integrations.comfyui.ensemble import ensemble_model, runner_of, with_settings
from integrations.comfyui.settings import Settings
from integrations.comfyui.tests.models import patcher
from integrations.comfyui.tests.test_ensemble import sample, saved
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
