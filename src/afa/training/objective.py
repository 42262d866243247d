"""The experts' own denoising objective, for the ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import SchedulerMixin
    from torch import Tensor


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The forward process that the experts' sampling scheduler undoes.

    Raises:
        AfaError: its prediction type is neither `epsilon` nor `v_prediction`.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise AfaError(
            f"Experts must predict noise (epsilon) or velocity (v_prediction), came '{kind}'."
        )
    return DDPMScheduler.from_config(scheduler.config)


def noise_and_target(
    scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    """The noisy latent, and what the denoiser should predict from it.

    Args:
        scheduler: from `training_scheduler`.
        clean: scaled latents [B, C, H, W].
        noise: standard normal, same shape.
        timestep: [B], integers.

    Returns: noisy latents and the target, noise or velocity (Salimans & Ho, 2022), same shape.
    """
    noisy = scheduler.add_noise(clean, noise, timestep)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(clean, noise, timestep)
    return noisy, noise


def denoising_loss(
    denoiser: Callable[..., tuple[Tensor]],
    scheduler: DDPMScheduler,
    clean: Tensor,
    text: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the fused prediction (AFA, eq. 5), in float32.

    Noise is added in float32, since bfloat16 rounds the little noise of the first timesteps away;
    the denoiser then gets it in the text's dtype.

    Args:
        denoiser: the ensemble, called as `denoiser(noisy, timestep, text, return_dict=False)`.
        scheduler: from `training_scheduler`.
        clean: scaled latents [B, C, H, W], in float32.
        text: text embeddings [B, L, N * D] or [B, L, D], in the experts' dtype.
        generator: on the CPU; draws timesteps and noise.
    """
    steps = scheduler.config.num_train_timesteps
    timestep = torch.randint(steps, (len(clean),), generator=generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    noisy, target = noise_and_target(scheduler, clean, noise, timestep)
    predicted = denoiser(noisy.to(text.dtype), timestep, text, return_dict=False)[0]
    return F.mse_loss(predicted.float(), target.float())
