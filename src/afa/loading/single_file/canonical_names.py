"""Canonical names for the tensors of single files, so that one model has one set of names.

The same model is published with several names: with and without `model.diffusion_model.`, with and
without the `text_model.` that older versions of transformers omit, with the autoencoder under
`first_stage_model.` or `vae.`, or as a denoiser without prefix in diffusers' layout.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable

#: prefix of a denoiser's tensors in the original layout
DENOISER = "model.diffusion_model."
_SHORT_DENOISER = "diffusion_model."
_VAE, _SHORT_VAE = "first_stage_model.", "vae."
# first parts of names that identify a diffusers transformer without a prefix
_TRANSFORMER = frozenset({"transformer_blocks", "single_transformer_blocks"})
# prefixes that never belong to a denoiser without a prefix
_OTHERS = (
    *("model.", "unet.", "transformer.", "text_encoder", "cond_stage_model.", "conditioner."),
    *("text_model.", "clip_l.", "clip_g.", "t5xxl."),
    *(_VAE, _SHORT_VAE, _SHORT_DENOISER, "model_ema.", "denoiser.", "edm_", "model_sampling."),
)
#: buffers of the noise schedule that training code saves with the weights
SCHEDULE = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recipm1_|recip_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|((denoiser|model_sampling)\.)?(log_)?sigmas)"
)
#: tensors that only mark what a model predicts; `afa.loading.prediction` reads them
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# text encoders in transformers' layout; T5 is not among them
_OLD_CLIP = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.clip_[lg])\.transformer\.)"
    r"(?=(?:embeddings|encoder|final_layer_norm)\.)"
)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of one file's tensors to canonical names.

    In the original layout these are the names of the published checkpoints
    (`model.diffusion_model.`, `cond_stage_model.transformer.text_model.`, `first_stage_model.`).
    Diffusers' denoisers without a prefix get that of a pipeline folder (`unet.`, `transformer.`).
    Canonical names and names of unknown layouts are not changed.

    Returns: name -> canonical name, in the given order; not necessarily unique.
    """
    names = list(names)
    roots = {name.split(".", 1)[0] for name in names}
    # of some families, the original code has names that the library has as well
    library = next((f for f in FAMILIES if roots.intersection(f.library_blocks)), None)
    if library is not None:
        prefix = f"{library.component}."
    elif any(roots.intersection(family.original_blocks) for family in FAMILIES):
        prefix = DENOISER
    else:
        prefix = "transformer." if roots & _TRANSFORMER else ""
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
    """Map a U-Net's tensor names in the original layout to diffusers' names.

    Runs diffusers' own conversion on names instead of tensors, since it only renames U-Nets.

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
