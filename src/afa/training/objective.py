"""The experts' own denoising objective, for the ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import SchedulerMixin
    from torch import Tensor


class ForwardProcess(Protocol):
    """How a picture becomes noise, and what the denoiser should predict on the way back."""

    def timesteps(self, time: Tensor) -> Tensor:
        """The timesteps [B] for uniform numbers [B] from 0 to 1, as the denoiser takes them."""

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The noisy latent, and what the denoiser should predict from it.

        Args:
            clean: scaled latents [B, C, H, W], float32.
            noise: standard normal, same shape.
            timestep: [B], from `timesteps`.
        """

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """The weights [B] of Min-SNR (Hang et al., 2023, arXiv 2303.09556, section 3.4)."""


class Diffusion:
    """The forward process of DDPM, with noise or velocity (Salimans & Ho, 2022) as the target."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.predicts_velocity = scheduler.config.prediction_type == "v_prediction"

    def timesteps(self, time: Tensor) -> Tensor:
        """Integers, each as likely as any other."""
        count = self.scheduler.config.num_train_timesteps
        return (time * count).long().clamp(max=count - 1)

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise or velocity."""
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        if self.predicts_velocity:
            return noisy, self.scheduler.get_velocity(clean, noise, timestep)
        return noisy, noise

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity."""
        snr = compute_snr(self.scheduler, timestep)
        clamped = snr.clamp(max=gamma)
        if self.predicts_velocity:
            return clamped / (snr + 1)
        # a schedule of zero terminal SNR predicts velocity; with noise it would be 0 / 0 here
        return torch.where(snr > 0, clamped / snr, torch.ones_like(snr))


class FlowMatching:
    """Rectified flow: on the straight way from picture to noise, predict noise minus picture.

    Timesteps are drawn as in Stable Diffusion 3 (Esser et al., 2024, arXiv 2403.03206, section
    3.1), by a standard normal through a sigmoid, on the scheduler's own, possibly shifted, grid.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)

    def timesteps(self, time: Tensor) -> Tensor:
        """Floats of the scheduler's grid; the middle ones are the most likely."""
        grid = self.scheduler.timesteps.to(time.device)
        drawn = torch.special.ndtri(time.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
        return grid[(drawn * len(grid)).long().clamp(max=len(grid) - 1)]

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity of the flow."""
        sigma = timestep.to(clean) / self.scheduler.config.num_train_timesteps
        sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise, noise - clean

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """Refused: there is no such weight for flows.

        Raises:
            AfaError: always.
        """
        raise AfaError(
            "AFA-TRAIN-039",
            "training.min_snr_gamma is for experts that predict noise or velocity of a diffusion; "
            "these were trained with flow matching. Leave it out.",
        )


def forward_process(scheduler: SchedulerMixin) -> ForwardProcess:
    """The forward process that the experts' sampling scheduler undoes.

    Raises:
        AfaError: it is neither flow matching nor a diffusion with `epsilon` or `v_prediction`, or
            its noise levels are continuous.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    if type(scheduler).__name__.startswith("EDM"):
        raise AfaError(
            "AFA-TRAIN-040",
            f"Experts with {type(scheduler).__name__} predict on continuous noise levels (CosXL, "
            "Playground 2.5). Aggregators are trained on experts with discrete timesteps or flow "
            "matching. Train with other experts.",
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or kind == "flow_prediction":
        return FlowMatching(scheduler)
    if kind not in ("epsilon", "v_prediction"):
        raise AfaError(
            "AFA-TRAIN-041",
            f"Experts must predict noise (epsilon) or velocity (v_prediction), or be trained with "
            f"flow matching, came '{kind}'.",
        )
    return Diffusion(scheduler)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: ForwardProcess,
    clean: Tensor,
    *,
    noise: Tensor,
    time: Tensor,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the fused prediction (AFA, eq. 5) for every sample, in float32.

    Noise is added in float32, since bfloat16 rounds the little noise of the first timesteps away.

    Args:
        predict: a prediction [B, C, H, W] from noisy latents [B, C, H, W] in float32 and timesteps
            [B]; see `conditions.Conditioning`.
        process: from `forward_process`.
        clean: scaled latents [B, C, H, W], in float32.
        noise: standard normal, of the latents' shape.
        time: uniform numbers [B] from 0 to 1, which decide the timesteps.
        min_snr_gamma: weighs the samples by Min-SNR; None weighs them alike.

    Returns: [B]; its mean is the loss.
    """
    timestep = process.timesteps(time)
    noisy, target = process.noisy_and_target(clean, noise, timestep)
    loss = (predict(noisy, timestep).float() - target.float()).square().flatten(1).mean(1)
    if min_snr_gamma is not None:
        loss = loss * process.min_snr_weight(timestep, min_snr_gamma)
    return loss
