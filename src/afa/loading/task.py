"""What a pipeline draws: from a prompt alone or not, and pictures of which size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from afa.denoisers.autoencoders import autoencoder_of
from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.predictor import Predictor
from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.denoisers.family import PipelineKind


def check_text_to_image(pipeline: DiffusionPipeline) -> None:
    """Check that experts draw from a prompt alone: not for inpainting, depth or upscaling.

    Raises:
        AfaError: if the denoiser's channels differ from the latent's, or it needs class labels.
    """
    config, vae = denoiser_of(pipeline).config, pipeline.vae
    latent_channels = autoencoder_of(vae).channels(vae.config)
    kind = kind_of_pipeline(pipeline)
    if type(pipeline).__name__ in kind.others:
        raise AfaError(
            "AFA-LOAD-043",
            f"A {type(pipeline).__name__} needs a picture besides the prompt; text-to-image "
            "experts must draw from a prompt alone. Call the pipeline from Python.",
        )
    inputs, outputs = kind.latent_channels(config), config.get("out_channels") or config.in_channels
    # transformers may also return a variance, or pack the latent
    is_other_output = kind.gives_latent and outputs != latent_channels
    if inputs != latent_channels or is_other_output:
        raise AfaError(
            "AFA-LOAD-044",
            f"These experts have {inputs} input and {outputs} output channels; text-to-image "
            f"experts must have the autoencoder's {latent_channels}. They are for another task, "
            "such as inpainting; use the ensemble in the pipeline for that task, from Python.",
        )
    if not kind.text or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise AfaError(
            "AFA-LOAD-045",
            "These experts need class labels; text-to-image experts must draw from a prompt alone. "
            "Use the ensemble in the pipeline for their task, from Python.",
        )


def native_resolution(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Return the experts' native height and width in pixels."""
    height, width = kind_of_pipeline(pipeline).native_size(denoiser_of(pipeline).config)
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """Return the number of pixels of which height and width must be multiples."""
    patches = [kind.patch(config) for kind, config in _kinds_in(pipeline)]
    return pipeline.vae_scale_factor * math.lcm(*patches)


def largest_side(pipeline: DiffusionPipeline) -> int | None:
    """Return the number of pixels that no side may exceed; None if there is no limit."""
    limits = [kind.max_latent(config) for kind, config in _kinds_in(pipeline)]
    known = [limit for limit in limits if limit is not None]
    return pipeline.vae_scale_factor * min(known) if known else None


def _kinds_in(pipeline: DiffusionPipeline) -> list[tuple[PipelineKind, Any]]:
    """The kind of a pipeline and its denoiser's configuration, and those of other experts."""
    denoiser = denoiser_of(pipeline)
    found: list[tuple[PipelineKind, Any]] = [(kind_of_pipeline(pipeline), denoiser.config)]
    for expert in getattr(denoiser, "experts", ()):
        if isinstance(expert, Predictor):  # of a family of its own
            found.append((expert.kind, expert.denoiser.config))
    return found
