"""Experts from folders, hub ids or single files, to a stock diffusers pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

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
    from afa.experts import ExpertReference


def load_pipeline(
    experts: Sequence[str | Path],
    aggregators: SABWConfig | Sequence[nn.Module] | None = None,
    *,
    vae: str | Path | None = None,
    vae_revision: str | None = None,
    config: str | Path | None = None,
    revisions: Sequence[str | None] | None = None,
    hashes: Sequence[str | None] | None = None,
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
        vae_revision: of a hub id.
        config: for single files, a local diffusers folder of the same family, whose weights are
            not read; None takes the first folder among the experts, else asks the hub.
        revisions: of hub ids, one per expert.
        hashes: SHA-256 that the experts must have, as `afa inspect` shows it, one per expert.
        torch_dtype: of experts and autoencoder; aggregators are float32.
        device: where everything goes.

    Raises:
        AfaError: an expert that cannot be found or read, or experts that do not fit each other.
    """
    if not experts:
        raise AfaError("An ensemble must have at least one expert, came none.")
    revisions, hashes = revisions or [None] * len(experts), hashes or [None] * len(experts)
    config_folder = Path(config).expanduser() if config is not None else _first_folder(experts)
    loaded = [
        load_expert(
            source,
            revision=revision,
            config=config_folder,
            sha256=sha256,
            torch_dtype=torch_dtype,
        )
        for source, revision, sha256 in zip(experts, revisions, hashes, strict=True)
    ]
    check_experts(loaded)
    autoencoder, vae_reference = loaded[0].vae, loaded[0].reference
    if vae is not None or autoencoder is None:  # a single file brings its own, a folder does not
        autoencoder, vae_reference = load_vae(
            experts[0] if vae is None else vae,
            revision=loaded[0].reference.revision if vae is None else vae_revision,
            config=config_folder,
            torch_dtype=torch_dtype,
        )
    pipeline = assemble(loaded, aggregators, autoencoder).to(device)
    pipeline.unet.vae_reference = vae_reference
    if config is not None:  # the first folder among the experts is found again by itself
        pipeline.unet.config_source = os.path.abspath(Path(config).expanduser())
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


def load_single(
    source: str | Path,
    *,
    config: Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> tuple[StableDiffusionPipeline, ExpertReference]:
    """One checkpoint by itself, with its own autoencoder, as anyone would load it.

    Args:
        source: see `load_expert`, like the others.
        config: for a single file.
        torch_dtype: of all weights.

    Returns: a stock pipeline, and what was loaded.

    Raises:
        AfaError: see `load_expert`.
    """
    expert = load_expert(source, config=config, torch_dtype=torch_dtype)
    pipeline = StableDiffusionPipeline(
        vae=expert.vae or load_vae(source, torch_dtype=torch_dtype)[0],
        text_encoder=expert.text_encoder,
        tokenizer=expert.tokenizer,
        unet=expert.unet,
        scheduler=expert.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, expert.reference


def check_text_to_image(pipeline: StableDiffusionPipeline) -> None:
    """Refuse experts that draw from more than a prompt: for inpainting, depth, upscaling.

    Raises:
        AfaError: the denoiser takes other channels than the autoencoder makes, or class labels.
    """
    config, latent_channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if config.in_channels != latent_channels or config.out_channels != latent_channels:
        raise AfaError(
            f"Text-to-image experts must take and give the autoencoder's {latent_channels} "
            f"channels; these take {config.in_channels} and give {config.out_channels}. They are "
            "for another task, such as inpainting; put the ensemble into that task's pipeline."
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise AfaError(
            "Text-to-image experts must not need class labels; these do. Put the ensemble into "
            "the pipeline of their own task."
        )


def native_resolution(pipeline: StableDiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the experts were made for."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def _first_folder(experts: Sequence[str | Path]) -> Path | None:
    paths = (Path(source).expanduser() for source in experts)
    return next((path for path in paths if path.is_dir()), None)
