"""Which part of a model a checkpoint's tensor belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.parameters import parameter_sites
from afa.loading.single_file.canonical_names import DENOISER, canonical_names

if TYPE_CHECKING:
    from collections.abc import Iterable

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
#: parts that are no U-Net, as keys of per-block weights
OTHER_PARTS = ("transformer", *TEXT_ENCODERS, "vae")
# the start of a name -> part; a folder's names start with the part itself
_PREFIXES = {
    "unet.": "unet",
    **{f"{part}.": part for part in OTHER_PARTS},
    "model.diffusion_model.": "unet",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner of XL has that one alone
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_3",
    "first_stage_model.": "vae",
}


def part_of(name: str) -> str | None:
    """`unet`, `transformer`, `text_encoder`, ... or `vae`; None where the name fits none."""
    return next((part for start, part in _PREFIXES.items() if name.startswith(start)), None)


def block_keys(names: Iterable[str]) -> dict[str, str]:
    """For every tensor of a checkpoint its site in the U-Net, or its part if that is no U-Net.

    Args:
        names: of all tensors of a checkpoint: a single file's in any of its layouts, or a folder's
            behind their part (`unet.conv_in.weight`). Weights that are averaged over training
            (`model_ema.`) have the site of the weights that they average.

    Returns: name -> `conv_in`, `down.0.0`, ..., `transformer`, `text_encoder`, `vae`; names that
        fit nothing are left out.
    """
    canonical = canonical_names(names)
    known = canonical.values()
    is_flux = any("double_blocks." in name for name in known)
    is_transformer = is_flux or any("joint_blocks." in name for name in known)
    keys, unet = {}, {}
    for name, full in canonical.items():
        part = part_of(full)
        if is_transformer and part == "unet":
            part = "transformer"  # the original codes call it as they do a U-Net
        elif is_flux and part == "text_encoder_3":
            part = "text_encoder_2"
        if part == "unet":
            start = next(start for start in _PREFIXES if full.startswith(start))
            unet[full.removeprefix(start)] = name
        elif part is not None:
            keys[name] = part
    sites = {unet[parameter]: site for parameter, site in parameter_sites(unet).items()}
    averaged = {
        # as training code names what it averages: all dots left out behind `model_ema.`
        "model_ema." + canonical[name].removeprefix("model.").replace(".", ""): key
        for name, key in (keys | sites).items()
        if canonical[name].startswith(DENOISER)
    }
    twins = {name: averaged[full] for name, full in canonical.items() if full in averaged}
    return keys | sites | twins
