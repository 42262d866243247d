"""Targets and weights of the objective, against their definitions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import afa
from afa.denoisers.forward_process import Diffusion, FlowMatching, forward_process
from afa.denoisers.kinds import conditioning_of
from afa.training import denoising_loss
from afa.training.encoding import encode_captions
from tests.refusal import refusal
from tests.training.runs import SMALL


def sampler(kind: str = "epsilon", **config: Any) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear", **config)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets(kind: str) -> None:
    process = forward_process(sampler(kind))
    assert isinstance(process, Diffusion)
    clean, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    steps = torch.tensor([10, 900])
    noisy, target = process.noisy_and_target(clean, noise, steps)
    alpha = process.scheduler.alphas_cumprod[steps].view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(target, noise if kind == "epsilon" else velocity)


def test_all_timesteps_are_as_likely() -> None:
    process = forward_process(sampler())
    time = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    steps = process.timesteps(time)
    assert (steps.min(), steps.max()) == (0, 999)
    counts = steps[:-1].bincount()
    assert counts.min() >= 99
    assert counts.max() <= 101


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr(kind: str) -> None:
    """Hang et al., section 3.4: the loss in terms of the picture has the weight min(SNR, gamma)."""
    process = forward_process(sampler(kind))
    assert isinstance(process, Diffusion)
    steps = torch.tensor([0, 100, 500, 999])
    alpha = process.scheduler.alphas_cumprod[steps]
    snr = alpha / (1 - alpha)
    # an error e of the picture is one of e * sqrt(SNR) of noise, of e * sqrt(SNR + 1) of velocity
    in_terms_of_picture = snr if kind == "epsilon" else snr + 1
    weights = process.min_snr_weight(steps, 5.0) * in_terms_of_picture
    torch.testing.assert_close(weights, snr.clamp(max=5.0), rtol=1e-4, atol=1e-6)


def test_min_snr_with_zero_terminal_snr() -> None:
    process = forward_process(sampler("v_prediction", rescale_betas_zero_snr=True))
    assert process.min_snr_weight(torch.tensor([999]), 5.0).isfinite().all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_velocity_loss(zero_snr: bool) -> None:
    """The weighted error of predicted noise is that of the velocity that follows from it."""
    process = forward_process(sampler(rescale_betas_zero_snr=zero_snr))
    assert isinstance(process, Diffusion)
    clean, noise, predicted = (torch.randn(3, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    steps = torch.tensor([1, 500, 998])
    alpha = process.scheduler.alphas_cumprod[steps].double().view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    picture = (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    error = [
        alpha.sqrt() * eps - (1 - alpha).sqrt() * x
        for eps, x in ((noise, clean), (predicted, picture))
    ]
    of_velocity = (error[0] - error[1]).square().flatten(1).mean(1)
    of_noise = (noise - predicted).square().flatten(1).mean(1)
    torch.testing.assert_close(
        process.velocity_weight(steps).double() * of_noise, of_velocity, rtol=1e-4, atol=0
    )
    assert process.velocity_weight(torch.tensor([999])).isfinite().all()
    for other in (sampler("v_prediction"), FlowMatchEulerDiscreteScheduler()):
        assert (forward_process(other).velocity_weight(torch.tensor([1, 998])) == 1).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift: float) -> None:
    process = forward_process(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert isinstance(process, FlowMatching)
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    time = torch.tensor([0.5, 0.01, 0.99], dtype=torch.float64)
    steps = process.timesteps(time)
    sigma = (steps / 1000).view(3, 1, 1, 1)
    noisy, target = process.noisy_and_target(clean, noise, steps)
    torch.testing.assert_close(noisy, (1 - sigma) * clean + sigma * noise)
    torch.testing.assert_close(target, noise - clean)
    # one exact Euler step along the target leads to the picture
    torch.testing.assert_close(noisy - sigma * target, clean)
    # the median of the drawn times is the middle of the grid, as the shift has it
    assert float(steps[0]) / 1000 == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=2e-3)
    with refusal("AFA-TRAIN-039"):
        process.min_snr_weight(steps, 5.0)


def test_flow_matching_is_drawn_as_in_stable_diffusion_3() -> None:
    """Esser et al., section 3.1: the logit of the time is standard normal."""
    process = forward_process(FlowMatchEulerDiscreteScheduler())
    time = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = (process.timesteps(time).double() / 1000).clamp(1e-3, 1 - 1e-3).logit()
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)


def test_other_objectives_are_refused() -> None:
    with refusal("AFA-TRAIN-041", "'sample'"):
        forward_process(sampler("sample"))


def test_the_loss_is_that_of_each_sample() -> None:
    process = forward_process(sampler())
    clean, noise = torch.zeros(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    time = torch.tensor([0.2, 0.8], dtype=torch.float64)

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.stack([noise[0], noise[1] + 3])

    losses = denoising_loss(predict, process, clean, noise=noise, time=time)
    torch.testing.assert_close(losses, torch.tensor([0.0, 9.0]))
    weight = process.min_snr_weight(process.timesteps(time), 5.0)
    weighed = denoising_loss(predict, process, clean, noise=noise, time=time, min_snr_gamma=5.0)
    torch.testing.assert_close(weighed, losses * weight)
    weight = process.velocity_weight(process.timesteps(time))
    weighed = denoising_loss(predict, process, clean, noise=noise, time=time, velocity_loss=True)
    torch.testing.assert_close(weighed, losses * weight)


def test_little_noise_is_not_rounded_away(experts: list[Path]) -> None:
    """In bfloat16 the noise of the first timesteps would vanish."""
    process = forward_process(sampler())
    assert isinstance(process, Diffusion)
    noise = torch.ones(2, 4, 2, 2)
    noisy, _ = process.noisy_and_target(torch.zeros_like(noise), noise, torch.tensor([0, 1]))
    expected = (1 - process.scheduler.alphas_cumprod[:2]).sqrt()
    torch.testing.assert_close(noisy[:, 0, 0, 0], expected)
    seen = []

    def denoiser(noisy: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        seen.append(noisy.dtype)
        return (noisy,)

    pipeline = afa.load_pipeline(experts, SMALL, torch_dtype=torch.bfloat16)
    conditions = encode_captions(pipeline, ["a fox"] * 2)
    predict = partial(conditioning_of(pipeline).predict, pipeline, denoiser, conditions=conditions)
    time = torch.tensor([0.1, 0.2], dtype=torch.float64)
    denoising_loss(predict, process, torch.zeros_like(noise), noise=noise, time=time)
    assert seen == [torch.bfloat16]
