"""Objectives: one time axis for all, and predictions that are converted into each other."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from afa.denoisers.objective import Objective, convert, objective_of

SCALED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {**SCALED, "prediction_type": "epsilon"},
    "v_prediction": {**SCALED, "prediction_type": "v_prediction"},
    "zero SNR": {**SCALED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "linear": {"prediction_type": "epsilon"},
    "sample": {**SCALED, "prediction_type": "sample"},
    "flow_prediction": {},
}


def scheduler(name: str) -> Any:
    if name == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(**KINDS[name], clip_sample=False, set_alpha_to_one=False)


def objective(name: str) -> Objective:
    found = objective_of(scheduler(name))
    assert found is not None
    return found


def noisy_and_prediction(name: str, steps: Tensor, clean: Tensor, noise: Tensor) -> Any:
    """What the library adds, and what a perfect model predicts, at integer timesteps."""
    if name == "flow_prediction":
        share = (steps / 1000).view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise, noise - clean
    adding = DDPMScheduler(**KINDS[name])
    kind = KINDS[name]["prediction_type"]
    noisy = adding.add_noise(clean, noise, steps.long())
    velocity = adding.get_velocity(clean, noise, steps.long())
    return noisy, {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]


@pytest.mark.parametrize(("own", "wanted"), list(product(KINDS, KINDS)))
def test_perfect_predictions_are_converted_into_perfect_ones(own: str, wanted: str) -> None:
    """Against the library's own noise and velocity, at a timestep of the wanted schedule."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    steps = torch.tensor([31.0, 400.0, 700.0])
    ours, theirs = objective(own), objective(wanted)
    seen, right = noisy_and_prediction(wanted, steps, clean, noise)
    angle = theirs.angle(steps)
    level, own_steps = theirs.level(angle), ours.timestep(angle)
    own_level = ours.level(ours.angle(own_steps))
    scale = (own_level.norm / level.norm).view(-1, 1, 1, 1)
    cos, sin, norm = (each.view(-1, 1, 1, 1).double() for each in own_level)
    torch.testing.assert_close(
        seen * scale, norm * (cos * clean + sin * noise), atol=1e-5, rtol=1e-5
    )
    given = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": cos * noise - sin * clean,
        "flow_prediction": noise - clean,
    }[ours.predicts]
    found = convert(given, seen * scale, (ours, own_level), (theirs, level))
    torch.testing.assert_close(found.double(), right, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "flow_prediction"])
def test_the_clean_latent_is_what_the_library_says(name: str) -> None:
    """The library computes it of any prediction, right or wrong, at any of its timesteps."""
    torch.manual_seed(1)
    prediction, noisy = torch.randn(2, 1, 4, 5, 5)
    stock, own = scheduler(name), objective(name)
    stock.set_timesteps(1000)
    for timestep in (0, 400, 998):
        right = stock.step(prediction, timestep, noisy).pred_original_sample
        level = own.level(own.angle(torch.tensor([timestep])))
        found = convert(prediction, noisy, (own, level), (objective("sample"), level))
        torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", list(KINDS))
def test_timesteps_and_angles_are_inverse(name: str) -> None:
    own = objective(name)
    steps = torch.tensor([1.0, 2.5, 333.0, 700.25, 998.0, 999.0])
    angles = own.angle(steps)
    assert (angles.diff() > 0).all()
    torch.testing.assert_close(own.timestep(angles), steps, atol=2e-2, rtol=0)


def test_whole_timesteps_have_the_angles_of_the_schedule() -> None:
    own = objective("epsilon")
    products = DDPMScheduler(**SCALED).alphas_cumprod
    level = own.level(own.angle(torch.arange(1000)))
    torch.testing.assert_close(level.cos**2, products, atol=1e-6, rtol=1e-5)


def test_pure_noise_is_seen_at_the_last_level_of_a_schedule_without_it() -> None:
    """With zero terminal SNR, the velocity of pure noise is the clean latent, and is finite."""
    torch.manual_seed(2)
    noise, clean = torch.randn(2, 1, 4, 5, 5)
    wanted, own = objective("zero SNR"), objective("epsilon")
    angle = wanted.angle(torch.tensor([999]))
    level, steps = wanted.level(angle), own.timestep(angle)
    assert steps.item() == 999
    assert level.cos.abs().item() < 1e-6
    own_level = own.level(own.angle(steps))
    cos, sin, _ = (each.item() for each in own_level)
    assert cos > 0.06
    predicted = (noise - cos * clean) / sin  # a model that knows the picture
    found = convert(predicted, noise, (own, own_level), (wanted, level))
    torch.testing.assert_close(found, -clean, atol=1e-4, rtol=1e-4)


def test_what_has_no_objective() -> None:
    for unknown in (EDMDPMSolverMultistepScheduler(), IPNDMScheduler()):
        assert objective_of(unknown) is None
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert objective_of(flow) == objective("flow_prediction")
    assert objective_of(DDPMScheduler(prediction_type="epsilon")) == objective("linear")
