"""Experts from folders, hub ids or single files, to a stock diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionPipeline

from afa.ensemble import EnsembleDenoiser
from afa.errors import AfaError
from afa.experts import Expert, load_expert, load_vae
from afa.preflight import check_experts
from afa.text import EnsembleTextEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from afa.aggregators import SABWConfig


def load_pipeline(
    experts: Sequence[str | Path],
    aggregators: SABWConfig | Sequence[nn.Module] | None = None,
    *,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    revisions: Sequence[str | None] | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Put several Stable Diffusion models into one stock pipeline.

    Other stock pipelines take the same parts:
    `StableDiffusionImg2ImgPipeline(**pipeline.components)`.

    Args:
        experts: diffusers folders, single `.safetensors` files, hub ids, or `zoo:animals`.
        aggregators: a `SABWConfig` for untrained ones, one fusion rule per site, or None for the
            uniform mean.
        vae: where the autoencoder comes from; None takes the first expert's.
        config: for single files, a local diffusers folder of the same family, whose weights are
            not read; None takes the first folder among the experts, else asks the hub.
        revisions: of hub ids, one per expert.
        torch_dtype: of experts and autoencoder; aggregators are float32.
        device: where everything goes.

    Raises:
        AfaError: an expert that cannot be found or read, or experts that do not fit each other.
    """
    if not experts:
        raise AfaError("An ensemble must have at least one expert, came none.")
    revisions = revisions or [None] * len(experts)
    config_folder = Path(config) if config is not None else _first_folder(experts)
    loaded = [
        load_expert(
            source,
            revision=revision,
            config=config_folder,
            torch_dtype=torch_dtype,
            with_vae=n == 0 and vae is None,
        )
        for n, (source, revision) in enumerate(zip(experts, revisions, strict=True))
    ]
    check_experts(loaded)
    autoencoder: Any = loaded[0].vae if vae is None else load_vae(vae, torch_dtype)
    pipeline = assemble(loaded, aggregators, autoencoder).to(device)
    pipeline.unet.vae_source = None if vae is None else str(vae)
    return pipeline


def assemble(
    experts: Sequence[Expert],
    aggregators: SABWConfig | Sequence[nn.Module] | None,
    vae: nn.Module,
) -> StableDiffusionPipeline:
    """A stock pipeline around an ensemble of loaded experts; the first one's scheduler is used."""
    denoiser = EnsembleDenoiser([expert.unet for expert in experts], aggregators)
    denoiser.references = [expert.reference for expert in experts]
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=EnsembleTextEncoder([expert.text_encoder for expert in experts]),
        tokenizer=experts[0].tokenizer,
        unet=denoiser,
        scheduler=experts[0].scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    vae.requires_grad_(False)
    return pipeline


def native_resolution(pipeline: StableDiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the experts were made for."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def _first_folder(experts: Sequence[str | Path]) -> Path | None:
    folders = (Path(source) for source in experts if Path(source).is_dir())
    return next(folders, None)
