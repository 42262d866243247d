"""The forward process of a model: how noise is added, and what its denoiser predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from afa.errors import AfaError
from afa.machine.devices import place_for_float64

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from torch import Tensor


class ForwardProcess(Protocol):
    """A forward process: adds noise to latents and defines the denoiser's target."""

    def timesteps(self, time: Tensor) -> Tensor:
        """Return the denoiser's timesteps [B] for uniform numbers [B] from 0 to 1."""

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the noisy latent and the target of the denoiser's prediction.

        Args:
            clean: scaled latents [B, C, H, W], float32.
            noise: standard normal, same shape.
            timestep: [B], from `timesteps`.
        """

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """Return the weights [B] of Min-SNR (Hang et al., 2023, arXiv 2303.09556, section 3.4)."""

    def velocity_weight(self, timestep: Tensor) -> Tensor:
        """Return the weights [B] with which the loss is that of the velocity.

        An error e of the noise is one of e sqrt((SNR + 1) / SNR) of the velocity (Salimans & Ho,
        2022, arXiv 2202.00512).
        """


class Diffusion:
    """The forward process of DDPM with noise or velocity (Salimans & Ho, 2022) as the target."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.predicts_velocity = scheduler.config.prediction_type == "v_prediction"

    def timesteps(self, time: Tensor) -> Tensor:
        """Return uniformly distributed integers."""
        count = self.scheduler.config.num_train_timesteps
        return (time * count).long().clamp(max=count - 1)

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the noisy latent, and noise or velocity."""
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        if self.predicts_velocity:
            return noisy, self.scheduler.get_velocity(clean, noise, timestep)
        return noisy, noise

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, gamma) / SNR for noise, or / (SNR + 1) for velocity."""
        snr = compute_snr(self.scheduler, timestep)
        clamped = snr.clamp(max=gamma)
        if self.predicts_velocity:
            return clamped / (snr + 1)
        # 0 / 0 for noise prediction with a zero terminal SNR, which is not a sensible combination
        return torch.where(snr > 0, clamped / snr, torch.ones_like(snr))

    def velocity_weight(self, timestep: Tensor) -> Tensor:
        """Return (SNR + 1) / SNR for noise, and 1 for velocity."""
        snr = compute_snr(self.scheduler, timestep)
        if self.predicts_velocity:
            return torch.ones_like(snr)
        # pure noise says nothing about the picture if noise is predicted
        return torch.where(snr > 0, (snr + 1) / snr, torch.ones_like(snr))


class FlowMatching:
    """Rectified flow: interpolates linearly between picture and noise; the target is noise - clean.

    Timesteps are drawn as in Stable Diffusion 3 (Esser et al., 2024, arXiv 2403.03206, section
    3.1): the sigmoid of a standard normal, on the scheduler's own, possibly shifted, grid.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)

    def timesteps(self, time: Tensor) -> Tensor:
        """Return timesteps of the scheduler's grid; the middle ones are the most likely."""
        place = place_for_float64(time.device)
        grid = self.scheduler.timesteps.to(place)
        drawn = torch.special.ndtri(time.to(place).double().clamp(1e-6, 1 - 1e-6)).sigmoid()
        return grid[(drawn * len(grid)).long().clamp(max=len(grid) - 1)].to(time.device)

    def noisy_and_target(
        self, clean: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the noisy latent and the velocity of the flow."""
        sigma = timestep.to(clean) / self.scheduler.config.num_train_timesteps
        sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise, noise - clean

    def min_snr_weight(self, timestep: Tensor, gamma: float) -> Tensor:
        """Refuse Min-SNR, which is not defined for flow matching.

        Raises:
            AfaError: always.
        """
        raise AfaError(
            "AFA-TRAIN-039",
            "training.min_snr_gamma is not defined for these experts, which were trained with flow "
            "matching. Remove it.",
        )

    def velocity_weight(self, timestep: Tensor) -> Tensor:
        """Return 1: what is predicted is the velocity of the flow."""
        return torch.ones(timestep.shape, device=timestep.device)


def forward_process(scheduler: SchedulerMixin) -> ForwardProcess:
    """Return the forward process that matches the experts' sampling scheduler.

    Raises:
        AfaError: if it is neither flow matching nor diffusion with `epsilon` or `v_prediction`, or
            its noise levels are continuous.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    if type(scheduler).__name__.startswith("EDM"):
        raise AfaError(
            "AFA-TRAIN-040",
            f"The experts' {type(scheduler).__name__} has continuous noise levels (CosXL, "
            "Playground 2.5). Aggregators can only be trained on experts with discrete timesteps "
            "or flow matching. Use other experts.",
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or kind == "flow_prediction":
        return FlowMatching(scheduler)
    if kind not in ("epsilon", "v_prediction"):
        raise AfaError(
            "AFA-TRAIN-041",
            f"The experts' scheduler has the prediction type '{kind}'; it must be epsilon, "
            "v_prediction or flow matching. Use other experts.",
        )
    return Diffusion(scheduler)
