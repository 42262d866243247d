"""Pipelines, prompts and single files of U-Nets: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.family import (
    VAE_PREFIXES,
    Ambiguous,
    Conditioning,
    FileDenoiser,
    PipelineKind,
    SingleFiles,
)
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

    from afa.denoisers.family import Conditions, Shapes

# -- prompts ----------------------------------------------------------------------------------


def _encode_sd(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    return {"text": pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)[0]}


def _predict_sd(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text = conditions["text"]
    return denoiser(noisy.to(text.dtype), timestep, text, return_dict=False)[0]


def _encode_xl(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        captions,
        device=pipeline.text_encoder_2.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if pipeline.config.force_zeros_for_empty_prompt:  # the pipeline does this without a prompt
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


# -- single files -----------------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    """Choose the configuration by the channels of the latent and the widths of both embeddings."""
    first, added = "input_blocks.0.0.weight", "label_emb.0.0.weight"
    attention = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    if file.is_diffusers:
        first, added = "conv_in.weight", "add_embedding.linear_1.weight"
        attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    channels, pooled, width = file.size(first, 1), file.size(added, 1), file.size(attention, 1)
    known = {
        (0, 768, 4): "stable-diffusion-1.5",
        (0, 768, 9): "stable-diffusion-1.5-inpainting",
        (0, 1024, 9): "stable-diffusion-2-inpainting",
        (2816, 0, 4): "stable-diffusion-xl",
        (2816, 0, 9): "stable-diffusion-xl-inpainting",
        (2560, 0, 4): "stable-diffusion-xl-refiner",
    }
    if (pooled, width, channels) == (0, 1024, 4):
        if file.predicts is None:
            raise Ambiguous(
                "AFA-MODEL-011",
                f"'{file.source}' fits both stable-diffusion-2, which predicts velocity, and "
                "stable-diffusion-2-base, which predicts noise; the tensors do not tell. Name the "
                "right one: config=stable-diffusion-2 or config=stable-diffusion-2-base.",
            )
        is_velocity = file.predicts == "v_prediction"
        return "stable-diffusion-2" if is_velocity else "stable-diffusion-2-base"
    name = known.get((pooled, width, channels))
    if name is None:
        raise AfaError(
            "AFA-MODEL-012",
            f"'{file.source}' is a U-Net with {channels} channels, text width {width} and pooled "
            f"width {pooled}, which no bundled configuration describes. Name a diffusers folder of "
            "the same architecture: config=FOLDER.",
        )
    # only with zero terminal SNR; otherwise `afa.loading.prediction` changes the scheduler
    if name == "stable-diffusion-xl" and file.predicts == "v_prediction" and file.has_zero_snr:
        return "stable-diffusion-xl-v"
    return name


def _convert(
    tensors: Mapping[str, Tensor], settings: dict[str, Any], folder: Path
) -> dict[str, Tensor]:
    """Use diffusers' conversion, which expects the prefix and one number of layers."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    layers = settings["layers_per_block"]
    if not isinstance(layers, int):
        if len(set(layers)) != 1:
            raise AfaError(
                "AFA-MODEL-013",
                f"'{folder}' has layers_per_block = {layers}, but a single file must have the same "
                "number of layers in every block. Use the model as a diffusers folder.",
            )
        settings["layers_per_block"] = layers[0]
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    result: dict[str, Tensor] = convert_ldm_unet_checkpoint(prefixed, config=settings)
    return result


#: its tensors do not tell whether it predicts noise or velocity
STABLE_DIFFUSION_2 = "Stable Diffusion 2.x"
_VAE = VAE_PREFIXES[0]
_CONTEXT = re.compile(r".*\.attn2\.to_k\.weight")
_VARIANTS = {
    (False, 768): "Stable Diffusion 1.x",
    (False, 1024): STABLE_DIFFUSION_2,
    (True, 2048): "Stable Diffusion XL",
    (True, 1280): "Stable Diffusion XL refiner",
}


def unet_variant(shapes: Shapes) -> str | None:
    """The usual name of a U-Net, by the width of the text embedding that it reads."""
    if not any(name in shapes for name in ("input_blocks.0.0.weight", "conv_in.weight")):
        return None
    widths = [shape[1] for name, shape in shapes.items() if _CONTEXT.fullmatch(name)]
    pooled = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
    is_pooled, width = any(name in shapes for name in pooled), max(widths, default=0)
    kind = STABLE_DIFFUSION_XL if is_pooled else STABLE_DIFFUSION
    return _VARIANTS.get((is_pooled, width), f"{kind.name} with text of width {width}")


def _written(shapes: Shapes, parts: Collection[str]) -> dict[str, str]:
    """The prefixes of Stable Diffusion 1.x and 2.x, which differ in the code of the encoder."""
    del parts
    encoder = "model" if unet_variant(shapes) == STABLE_DIFFUSION_2 else "transformer"
    return {"text_encoder": f"cond_stage_model.{encoder}.", "vae": _VAE}


def _written_xl(shapes: Shapes, parts: Collection[str]) -> dict[str, str]:
    """The prefixes of Stable Diffusion XL and of its refiner, which has the second encoder only."""
    del shapes
    first = (
        {"text_encoder": "conditioner.embedders.0.transformer."} if "text_encoder" in parts else {}
    )
    second = f"conditioner.embedders.{len(first)}.model."
    return {**first, "text_encoder_2": second, "vae": _VAE}


# a ControlNet has only the first of these; the up blocks identify a U-Net
_ORIGINAL = ("input_blocks.0.0.weight",)
_DIFFUSERS = (
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "up_blocks.0.resnets.0.conv1.weight",
)
_BLOCKS = {r".+\.transformer_blocks\.\d+": "attention layers"}

STABLE_DIFFUSION = PipelineKind(
    name="Stable Diffusion",
    pipelines=("StableDiffusionPipeline",),
    others=("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    text=("text_encoder",),
    clip_layer="last",
    conditioning=Conditioning(_encode_sd, _predict_sd),
    single_files=SingleFiles(
        configuration=_configuration,
        parts={"text_encoder": ("cond_stage_model.",), "vae": VAE_PREFIXES},
        original=_ORIGINAL,
        diffusers=_DIFFUSERS,
        blocks=_BLOCKS,
        convert=_convert,
        written=_written,
        gguf="sd1",
        architectures={
            "stable-diffusion-1.5": "stable-diffusion-v1",
            "stable-diffusion-1.5-inpainting": "stable-diffusion-v1-inpainting",
            "stable-diffusion-2": "stable-diffusion-v2-768-v",
            "stable-diffusion-2-base": "stable-diffusion-v2-512",
            "stable-diffusion-2-inpainting": "stable-diffusion-v2-inpainting",
        },
    ),
    gives_latent=True,
    carries_prompts=True,
)
STABLE_DIFFUSION_XL = PipelineKind(
    name="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    others=("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    text=("text_encoder", "text_encoder_2"),
    pooled=("text_encoder_2",),
    clip_layer="penultimate",
    conditioning=Conditioning(_encode_xl, _predict_xl),
    single_files=SingleFiles(
        configuration=_configuration,
        parts={
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
            "vae": VAE_PREFIXES,
        },
        original=(*_ORIGINAL, "label_emb.0.0.weight"),
        diffusers=(*_DIFFUSERS, "add_embedding.linear_1.weight"),
        blocks=_BLOCKS,
        convert=_convert,
        written=_written_xl,
        gguf="sdxl",
        architectures={
            "stable-diffusion-xl": "stable-diffusion-xl-v1-base",
            "stable-diffusion-xl-v": "stable-diffusion-xl-v1-base",
            "stable-diffusion-xl-inpainting": "stable-diffusion-xl-v1-inpainting",
            "stable-diffusion-xl-refiner": "stable-diffusion-xl-v1-refiner",
        },
    ),
    gives_latent=True,
    carries_prompts=True,
)
