"""The experts' denoising objective, for the ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from afa.denoisers.forward_process import ForwardProcess


def prediction_loss(
    predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, timestep: Tensor, target: Tensor
) -> Tensor:
    """Compute the mean squared error of a prediction by sample, in float32.

    Args:
        predict: see `denoising_loss`.
        noisy: noisy latents [B, C, H, W].
        timestep: [B].
        target: [B, C, H, W].

    Returns: [B].
    """
    return (predict(noisy, timestep).float() - target.float()).square().flatten(1).mean(1)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: ForwardProcess,
    clean: Tensor,
    *,
    noise: Tensor,
    time: Tensor,
    min_snr_gamma: float | None = None,
    velocity_loss: bool = False,
) -> Tensor:
    """Compute the mean squared error of the fused prediction (AFA, eq. 5) by sample, in float32.

    Noise is added in float32, because bfloat16 rounds off the small noise of the first timesteps.

    Args:
        predict: returns a prediction [B, C, H, W] for noisy latents [B, C, H, W] in float32 and
            timesteps [B]; see `afa.denoisers.family.Conditioning`.
        process: from `forward_process`.
        clean: scaled latents [B, C, H, W], in float32.
        noise: standard normal, of the latents' shape.
        time: uniform numbers [B] from 0 to 1, which determine the timesteps.
        min_snr_gamma: weights samples by Min-SNR; None weights them equally.
        velocity_loss: weights them so that the loss is that of the velocity; see
            `ForwardProcess.velocity_weight`.

    Returns: [B]; its mean is the loss.
    """
    timestep = process.timesteps(time)
    noisy, target = process.noisy_and_target(clean, noise, timestep)
    loss = prediction_loss(predict, noisy, timestep, target)
    if min_snr_gamma is not None:
        loss = loss * process.min_snr_weight(timestep, min_snr_gamma)
    if velocity_loss:
        loss = loss * process.velocity_weight(timestep)
    return loss
