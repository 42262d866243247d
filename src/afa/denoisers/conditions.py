"""What a prompt is to the denoisers of each kind: how it is encoded, and how it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxPipeline

from afa.denoisers.flux import FLUX
from afa.denoisers.kinds import kind_of_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    #: tensors by name, each with an entry per sample
    Conditions = Mapping[str, Tensor]

_GUIDANCE = 3.5  # of models that were distilled with it; what their pipelines take by default


@dataclass(frozen=True)
class Conditioning:
    """How denoisers of one kind are told what to draw.

    Attributes:
        encode: a pipeline's conditions for captions, as the pipeline itself would make them. The
            empty caption stands for no prompt.
        predict: from a pipeline (for its configuration), its denoiser as it is called, noisy
            latents [B, C, H, W], timesteps [B] and conditions: a prediction [B, C, H, W].
    """

    encode: Callable[[Any, list[str]], dict[str, Tensor]]
    predict: Callable[..., Tensor]


def conditioning_of(pipeline: Any) -> Conditioning:
    """That of a pipeline's kind."""
    return CONDITIONINGS[kind_of_pipeline(pipeline).name]


def options_of(pipeline: Any) -> dict[str, Any]:
    """What a pipeline is told besides its parts, as `force_zeros_for_empty_prompt`; its class."""
    told = {
        key: value
        for key, value in pipeline.config.items()
        if not key.startswith("_") and not isinstance(value, list | tuple)
    }
    return {"class": type(pipeline).__name__, **told}


# -- Stable Diffusion -------------------------------------------------------------------------


def _encode_sd(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    return {"text": pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)[0]}


def _predict_sd(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text = conditions["text"]
    return denoiser(noisy.to(text.dtype), timestep, text, return_dict=False)[0]


# -- Stable Diffusion XL ----------------------------------------------------------------------


def _encode_xl(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        captions,
        device=pipeline.text_encoder_2.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if pipeline.config.force_zeros_for_empty_prompt:  # so does the pipeline without a prompt
        empty = torch.tensor([not caption for caption in captions], device=text.device)
        text = text.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    return {"text": text, "pooled": pooled}


def _predict_xl(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text = conditions["text"]
    added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"].to(text.dtype)}
    return denoiser(
        noisy.to(text.dtype), timestep, text, added_cond_kwargs=added, return_dict=False
    )[0]


# -- Stable Diffusion 3 -----------------------------------------------------------------------


def _encode_sd3(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        captions,
        captions,
        captions,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return {"text": text, "pooled": pooled}


def _predict_sd3(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text = conditions["text"]
    return denoiser(
        hidden_states=noisy.to(text.dtype),
        timestep=timestep,
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled"],
        return_dict=False,
    )[0]


# -- Flux -------------------------------------------------------------------------------------


def _encode_flux(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, pooled, _ = pipeline.encode_prompt(
        captions, captions, device=pipeline.text_encoder.device
    )
    return {"text": text, "pooled": pooled}


def _predict_flux(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text = conditions["text"]
    batch, channels, height, width = noisy.shape
    place: dict[str, Any] = {"device": noisy.device, "dtype": text.dtype}
    guidance = None
    if pipeline.transformer.config.guidance_embeds:
        guidance = torch.full((batch,), _GUIDANCE, device=noisy.device)
    packed = denoiser(
        hidden_states=FluxPipeline._pack_latents(
            noisy.to(text.dtype), batch, channels, height, width
        ),
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled"],
        timestep=(timestep / FLUX.timestep_divisor).to(text.dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **place),
        txt_ids=torch.zeros(text.shape[1], 3, **place),
        guidance=guidance,
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    return FluxPipeline._unpack_latents(packed, height * factor, width * factor, factor)


# -- PixArt -----------------------------------------------------------------------------------


def _encode_pixart(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, mask, _, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, device=pipeline.text_encoder.device
    )
    return {"text": text, "mask": mask}


def _predict_pixart(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text, config = conditions["text"], pipeline.transformer.config
    batch, channels, height, width = noisy.shape
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if config.sample_size == 128:
        pixels = torch.tensor([height, width]) * pipeline.vae_scale_factor
        added["resolution"] = pixels.to(text).expand(batch, 2)
        added["aspect_ratio"] = torch.full((batch, 1), height / width).to(text)
    predicted = denoiser(
        noisy.to(text.dtype),
        encoder_hidden_states=text,
        encoder_attention_mask=conditions["mask"],
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return predicted[:, :channels]  # without the learned variance


CONDITIONINGS = {
    "Stable Diffusion": Conditioning(_encode_sd, _predict_sd),
    "Stable Diffusion XL": Conditioning(_encode_xl, _predict_xl),
    "Stable Diffusion 3": Conditioning(_encode_sd3, _predict_sd3),
    "Flux": Conditioning(_encode_flux, _predict_flux),
    "PixArt": Conditioning(_encode_pixart, _predict_pixart),
}
