"""Pictures to latents, captions to text embeddings: what the frozen parts of a pipeline do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from afa.training.order import Draw


class Posterior(NamedTuple):
    """The autoencoder's Gaussian over latents, each [B, C, H, W] in the autoencoder's dtype."""

    mean: Tensor
    logvar: Tensor


class Encoded(NamedTuple):
    """One batch as the loss takes it.

    Attributes:
        clean: sampled and scaled latents [B, C, H, W], float32.
        text: embeddings [B, L, N * D] or [B, L, D].
        noise: standard normal, of the latents' shape.
        time: uniform numbers [B] from 0 to 1.
    """

    clean: Tensor
    text: Tensor
    noise: Tensor
    time: Tensor


@torch.no_grad()
def encode_pictures(pipeline: StableDiffusionPipeline, pixels: Tensor) -> Posterior:
    """The posterior over latents of pictures [B, 3, H', W'] in -1..1."""
    vae = pipeline.vae
    posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    return Posterior(posterior.mean, posterior.logvar)


def encode_captions(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Text embeddings [B, L, N * D] or [B, L, D], as the pipeline itself would make them."""
    return pipeline.encode_prompt(list(captions), pipeline.text_encoder.device, 1, False)[0]


def as_batch(
    posterior: Posterior,
    text: Tensor,
    draws: Sequence[Draw],
    scaling_factor: float,
    device: torch.device,
) -> Encoded:
    """Sample latents with what was drawn, and put everything on one device.

    What is drawn was drawn on the CPU, so that a seed means the same everywhere.
    """
    mean = posterior.mean.to(device).float()
    std = (0.5 * posterior.logvar.to(device).float()).exp()
    drawn = torch.stack([draw.posterior for draw in draws]).to(device)
    return Encoded(
        clean=(mean + std * drawn) * scaling_factor,
        text=text.to(device),
        noise=torch.stack([draw.noise for draw in draws]).to(device),
        time=torch.tensor([draw.time for draw in draws], dtype=torch.float64, device=device),
    )


def latent_shape(pipeline: StableDiffusionPipeline, resolution: int) -> tuple[int, int, int]:
    """Shape [C, H, W] of the latent of a square picture."""
    side = resolution // pipeline.vae_scale_factor
    return pipeline.vae.config.latent_channels, side, side
