"""Which part of a model a checkpoint's tensor belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES
from afa.denoisers.unet_names import parameter_sites
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
    DENOISER: "unet",
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
    own = _parts_of_family(canonical.values())
    keys, unet = {}, {}
    for name, full in canonical.items():
        start = next((start for start in _PREFIXES if full.startswith(start)), "")
        part = own.get(start) or _PREFIXES.get(start)
        if part == "unet":
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


def _parts_of_family(names: Iterable[str]) -> dict[str, str]:
    """Start of a name -> part, where the family of a file in an original layout has its own."""
    names = list(names)
    for family in FAMILIES:
        if any(f"{root}." in name for root in family.original_blocks for name in names):
            files = [kind.single_files for kind in family.pipelines if kind.single_files]
            parts = [(part, starts) for each in files for part, starts in each.parts.items()]
            own = {start: part for part, starts in parts for start in starts}
            return {DENOISER: family.component, **own}
    return {}
