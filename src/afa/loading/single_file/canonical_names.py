"""Canonical names for the tensors of single files, so that one model has one set of names.

The same model is published under several names: with and without `model.diffusion_model.`, with and
without the `text_model.` that older versions of transformers leave out, with the autoencoder under
`first_stage_model.` or `vae.`, or as a bare denoiser in diffusers' layout.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable

#: how a denoiser's tensors start in the layout of the original codes
DENOISER = "model.diffusion_model."
_SHORT_DENOISER = "diffusion_model."
_VAE, _SHORT_VAE = "first_stage_model.", "vae."
# first parts of names by which a transformer of diffusers without a prefix is known
_TRANSFORMER = frozenset({"transformer_blocks", "single_transformer_blocks"})
# starts of names that belong to no denoiser, whatever else the file holds
_OTHERS = (
    *("model.", "unet.", "transformer.", "text_encoder", "cond_stage_model.", "conditioner."),
    *("text_model.", "clip_l.", "clip_g.", "t5xxl."),
    *(_VAE, _SHORT_VAE, _SHORT_DENOISER, "model_ema.", "denoiser.", "edm_", "model_sampling."),
)
#: buffers of the noise schedule that training code saves beside the weights
SCHEDULE = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recipm1_|recip_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|((denoiser|model_sampling)\.)?(log_)?sigmas)"
)
#: tensors that mark what a model predicts, and have no other use
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# text encoders in transformers' layout; T5 is not among them
_OLD_CLIP = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.clip_[lg])\.transformer\.)"
    r"(?=(?:embeddings|encoder|final_layer_norm)\.)"
)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """The canonical name of every tensor of one file.

    In the layout of the original codes these are the names of the published checkpoints
    (`model.diffusion_model.`, `cond_stage_model.transformer.text_model.`, `first_stage_model.`);
    bare denoisers of diffusers get the prefix that a pipeline's folder implies (`unet.`,
    `transformer.`). Names that are canonical, or of no known layout, stay as they are.

    Returns: name -> canonical name, in the given order. Two names may have the same one.
    """
    names = list(names)
    roots = {name.split(".", 1)[0] for name in names}
    if any(roots.intersection(family.original_blocks) for family in FAMILIES):
        prefix = DENOISER
    elif roots & _TRANSFORMER:
        prefix = "transformer."
    else:
        told = (f for f in FAMILIES if roots.intersection(f.library_blocks))
        prefix = next((f"{family.component}." for family in told), "")
    return {name: _canonical(name, prefix) for name in names}


def _canonical(name: str, prefix: str) -> str:
    if name.startswith(_SHORT_DENOISER):
        return DENOISER + name.removeprefix(_SHORT_DENOISER)
    if name.startswith(_SHORT_VAE):
        return _VAE + name.removeprefix(_SHORT_VAE)
    if prefix and not name.startswith(_OTHERS) and not SCHEDULE.fullmatch(name):
        return name if name in MARKERS else prefix + name
    return _OLD_CLIP.sub(r"\1text_model.", name)


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """The names that diffusers has for a U-Net's tensors in the original layout.

    diffusers' own conversion is run over names instead of tensors; for U-Nets it renames only.

    Args:
        names: canonical names of one file.

    Returns: canonical name -> name of the same tensor in a folder (`unet.conv_in.weight`),
        for the tensors of the U-Net that the conversion knows.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = {name: name for name in names if name.startswith(DENOISER)}
    downsamplers = [
        int(match[1])
        for match in map(re.compile(r".*input_blocks\.(\d+)\.0\.op\.weight").fullmatch, unet)
        if match
    ]
    config = {
        "layers_per_block": min(downsamplers, default=3) - 1,
        "addition_embed_type": "text_time" if f"{DENOISER}label_emb.0.0.weight" in unet else None,
    }
    converted = convert_ldm_unet_checkpoint(unet, config)
    return {theirs: f"unet.{ours}" for ours, theirs in converted.items() if theirs is not None}
