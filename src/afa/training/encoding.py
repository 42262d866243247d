"""Encode pictures as latents and captions as text embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from afa.denoisers.autoencoders import autoencoder_of
from afa.denoisers.kinds import conditioning_of
from afa.machine.devices import widest_float

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.training.order import Draw


class Posterior(NamedTuple):
    """Mean and log variance of the latents, each [B, C, H, W] in the autoencoder's dtype."""

    mean: Tensor
    logvar: Tensor


class Encoded(NamedTuple):
    """One batch for the loss.

    Attributes:
        clean: sampled and scaled latents [B, C, H, W], float32.
        conditions: the denoiser's other inputs by name; see `afa.denoisers.family.Conditioning`.
        noise: standard normal, of the latents' shape.
        time: uniform numbers [B] from 0 to 1.
        seeds: of further random numbers, one per sample.
    """

    clean: Tensor
    conditions: dict[str, Tensor]
    noise: Tensor
    time: Tensor
    seeds: tuple[int, ...] = ()


class Recorded(NamedTuple):
    """One batch of a teacher's predictions, for the loss.

    Attributes:
        noisy: the teacher's noisy latents [B, C, H, W], float32.
        timestep: the teacher's timesteps [B], in those of the scheduler.
        target: its predictions [B, C, H, W], float32.
        conditions: the denoiser's other inputs by name, as in `Encoded`.
        regulariser: called after the prediction, returns what is added to the loss; None for
            nothing.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    conditions: dict[str, Tensor]
    regulariser: Callable[[], Tensor] | None = None


Batch = Encoded | Recorded


@torch.no_grad()
def encode_pictures(pipeline: DiffusionPipeline, pixels: Tensor) -> Posterior:
    """Return the posterior over latents of pictures [B, 3, H', W'] in -1..1."""
    vae = pipeline.vae
    pixels = pixels.to(device=vae.device, dtype=vae.dtype)
    return Posterior(*autoencoder_of(vae).posterior(vae, pixels))


def encode_captions(pipeline: DiffusionPipeline, captions: Sequence[str]) -> dict[str, Tensor]:
    """Return text embeddings and other conditioning tensors, as the pipeline computes them."""
    return conditioning_of(pipeline).encode(pipeline, list(captions))


def as_batch(
    posterior: Posterior,
    conditions: Mapping[str, Tensor],
    draws: Sequence[Draw],
    vae: Any,
    device: torch.device,
) -> Encoded:
    """Sample latents with the drawn noise, and move the batch to one device.

    Random numbers are drawn on the CPU, so that a seed gives the same batch on every device. Only
    the autoencoder's configuration is used.
    """
    mean = posterior.mean.to(device).float()
    std = (0.5 * posterior.logvar.to(device).float()).exp()
    drawn = torch.stack([draw.posterior for draw in draws]).to(device)
    return Encoded(
        clean=autoencoder_of(vae).scaled(vae, mean + std * drawn),
        conditions={name: tensor.to(device) for name, tensor in conditions.items()},
        noise=torch.stack([draw.noise for draw in draws]).to(device),
        time=torch.tensor([draw.time for draw in draws], dtype=widest_float(device), device=device),
        seeds=tuple(draw.seed for draw in draws),
    )


def latent_shape(
    pipeline: DiffusionPipeline, height: int, width: int | None = None
) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of the latent of a picture; without a width, of a square one."""
    vae = pipeline.vae
    return autoencoder_of(vae).shape(vae.config, height, height if width is None else width)
