"""The layouts of single model files: which tensor belongs to which part of a pipeline.

A denoiser comes in the layout of the original code, behind `model.diffusion_model.`, behind
`diffusion_model.` or bare, or in the layout of diffusers. Text encoders and autoencoders come
behind the prefixes in `PARTS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from afa.loading.weights import Shapes

_VAE = ("first_stage_model.", "vae.")
#: kind of pipeline -> its part -> the prefixes of that part's tensors in whole checkpoints
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Stable Diffusion": {
        "unet": ("model.diffusion_model.",),
        "text_encoder": ("cond_stage_model.",),
        "vae": _VAE,
    },
    "Stable Diffusion XL": {
        "unet": ("model.diffusion_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
        "vae": _VAE,
    },
    "Stable Diffusion 3": {
        "transformer": ("model.diffusion_model.", "joint_blocks."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
        "vae": _VAE,
    },
    "Flux": {
        "transformer": ("model.diffusion_model.", "double_blocks."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
        "vae": _VAE,
    },
}
DENOISERS = ("unet", "transformer")
_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_DIFFUSERS_PREFIXES = ("", "unet.", "transformer.")
#: prefixes of parts other than the denoiser, in any kind of file
_OTHERS = tuple(
    start
    for parts in PARTS.values()
    for part, starts in parts.items()
    if part not in DENOISERS
    for start in starts
)
#: scalars that say what a model predicts; `afa.loading.prediction` reads them
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
#: tensors that change no picture, with the reason that `afa inspect` shows
HARMLESS = (
    (re.compile(r"model_ema\..+"), "moving average, beside the weights in use"),
    (
        re.compile(
            r"(betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_[a-z0-9_]+|logvar|lvlb_weights"
            r"|scale_factor|(denoiser|model_sampling)\.[a-z_]+)"
        ),
        "noise schedule, which the scheduler computes",
    ),
    (re.compile(r"(.+\.)?(position_ids|logit_scale|attn_mask)"), "buffer that no encoder reads"),
    (re.compile(r"(first_stage_model|vae)\.(loss|model_ema)\..+"), "training of the autoencoder"),
    (
        re.compile(r"(safety_checker|.+\.visual|vision_model|visual_projection)\..+"),
        "picture encoder",
    ),
    (
        re.compile(r"(.+\.)?(decoder\.(block|embed_tokens|final_layer_norm)\..+|lm_head\.weight)"),
        "decoder of T5",
    ),
    (re.compile(r"(.+\.)?spiece_model"), "tokenizer"),
    (re.compile(r"epoch|global_step|iteration"), "counter of the training"),
    (re.compile("|".join(map(re.escape, MARKERS))), "mark of what the model predicts"),
)


@dataclass(frozen=True)
class Denoiser:
    """How a file holds its denoiser.

    Attributes:
        kind: the kind of pipeline, as in `PARTS`.
        prefix: before the names of its tensors.
        is_diffusers: whether the names are those of diffusers, not of the original code.
    """

    kind: str
    prefix: str
    is_diffusers: bool = False


def denoiser_in(shapes: Shapes) -> Denoiser | None:
    """The denoiser of a file, whatever its size; None where the file holds none."""
    for start in _ORIGINAL_PREFIXES:
        if any(name.startswith(f"{start}double_blocks.") for name in shapes):
            return Denoiser("Flux", start)
        if any(name.startswith(f"{start}joint_blocks.") for name in shapes):
            return Denoiser("Stable Diffusion 3", start)
        if f"{start}input_blocks.0.0.weight" in shapes:
            is_xl = f"{start}label_emb.0.0.weight" in shapes
            return Denoiser("Stable Diffusion XL" if is_xl else "Stable Diffusion", start)
    for start in _DIFFUSERS_PREFIXES:
        kind = _diffusers_kind(shapes, start)
        if kind is not None:
            return Denoiser(kind, start, is_diffusers=True)
    return None


def _diffusers_kind(shapes: Shapes, start: str) -> str | None:
    def has(*names: str) -> bool:
        return all(f"{start}{name}" in shapes for name in names)

    # the last blocks tell a U-Net from a ControlNet, which has the first ones alone
    if has(
        "conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.conv1.weight"
    ):
        is_xl = has("add_embedding.linear_1.weight")
        return "Stable Diffusion XL" if is_xl else "Stable Diffusion"
    if has("pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"):
        return "Stable Diffusion 3"
    is_flux = has("x_embedder.weight", "transformer_blocks.0.norm1_context.linear.weight")
    return "Flux" if is_flux else None


def kind_name(shapes: Shapes) -> str | None:
    """The kind of pipeline whose denoiser a file holds, whatever its size; None without one."""
    found = denoiser_in(shapes)
    return None if found is None else found.kind


def harmless(name: str) -> str | None:
    """Why a tensor of a file is of no consequence; None where it may be of some."""
    return next((why for pattern, why in HARMLESS if pattern.fullmatch(name)), None)


def names_by_part(shapes: Shapes, kind: str) -> dict[str, dict[str, str]]:
    """Every tensor under the part that it belongs to.

    Args:
        shapes: of all tensors of a file.
        kind: of the pipeline that the file is read as, as in `PARTS`.

    Returns: part -> name without the part's prefix -> name in the file. Tensors of no part stand
        under an empty name, with their whole names. Parts that the file lacks are left out.
    """
    found: dict[str, dict[str, str]] = {}
    denoiser = denoiser_in(shapes)
    others = {
        start: part
        for part, starts in PARTS[kind].items()
        if part not in DENOISERS
        for start in starts
    }
    own = next(part for part in PARTS[kind] if part in DENOISERS)
    for name in shapes:
        start = next((start for start in others if name.startswith(start)), None)
        if start is not None:
            part, rest = others[start], name.removeprefix(start)
        elif denoiser is not None and denoiser.kind == kind and _is_of(name, denoiser):
            part, rest = own, name.removeprefix(denoiser.prefix)
        else:
            part, rest = "", name
        found.setdefault(part, {})[rest] = name
    return found


def _is_of(name: str, denoiser: Denoiser) -> bool:
    """Whether a tensor is the denoiser's; of a bare one is all that is nothing else."""
    if denoiser.prefix:
        return name.startswith(denoiser.prefix)
    return harmless(name) is None and not name.startswith(_OTHERS)
