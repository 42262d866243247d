"""Samplers that add noise at every step, beside what is reused of earlier steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler

from afa.ensemble.caching.settings import EXACT, PRESETS
from tests.ensemble.caching.test_loop import arguments_of, ensemble_of


def drawn(ensemble: Any, make: Any) -> torch.Tensor:
    """The latent at the end of one picture."""
    arguments, scheduler = arguments_of("unet"), make()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    latent = arguments["sample"] * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latent, timestep)
        call = {**arguments, "sample": given, "timestep": timestep.expand(len(given))}
        with torch.no_grad():
            noise = ensemble(**call, return_dict=False)[0]
        latent = scheduler.step(noise, timestep, latent, generator=generator)[0]
    return latent


@pytest.mark.parametrize("make", [LCMScheduler, EulerAncestralDiscreteScheduler])
def test_every_step_is_computed_in_full(make: Any) -> None:
    """The latent moves so far at each step that nothing is reused: right, though not faster."""
    ensemble = ensemble_of("unet")
    pictures = []
    for each in (EXACT, PRESETS["fast"]):
        ensemble.acceleration = each
        pictures.append(drawn(ensemble, make))
    assert torch.equal(*pictures)
