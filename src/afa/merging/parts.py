"""Map a checkpoint's tensors to components and U-Net sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES
from afa.denoisers.unet_names import parameter_sites
from afa.loading.single_file.canonical_names import DENOISER, canonical_names

if TYPE_CHECKING:
    from collections.abc import Iterable

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
#: components except the U-Net, as keys of block weights
OTHER_PARTS = ("transformer", *TEXT_ENCODERS, "vae")
# prefix of a name -> component; a folder's names start with the component itself
_PREFIXES = {
    "unet.": "unet",
    **{f"{part}.": part for part in OTHER_PARTS},
    DENOISER: "unet",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the XL refiner has only this one
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_3",
    "text_encoders.qwen3_4b.": "text_encoder",
    "first_stage_model.": "vae",
}


def part_of(name: str) -> str | None:
    """The component: `unet`, `transformer`, `text_encoder`, ..., `vae`; None if unknown."""
    return next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), None)


def block_keys(names: Iterable[str]) -> dict[str, str]:
    """Map the tensors of a checkpoint to their U-Net site, or to their component.

    Args:
        names: all tensors of a checkpoint: a single file's in any layout, or a folder's with their
            component as prefix (`unet.conv_in.weight`). Averaged weights (`model_ema.`) have the
            site of the weights that they average.

    Returns: name -> `conv_in`, `down.0.0`, ..., `transformer`, `text_encoder`, `vae`. Unknown names
        are omitted.
    """
    canonical = canonical_names(names)
    own = _parts_of_family(canonical.values())
    keys, unet = {}, {}
    for name, full in canonical.items():
        prefix = next((prefix for prefix in _PREFIXES if full.startswith(prefix)), "")
        part = own.get(prefix) or _PREFIXES.get(prefix)
        if part == "unet":
            unet[full.removeprefix(prefix)] = name
        elif part is not None:
            keys[name] = part
    sites = {unet[parameter]: site for parameter, site in parameter_sites(unet).items()}
    averaged = {
        # training code removes all dots from the names of averaged weights
        "model_ema." + canonical[name].removeprefix("model.").replace(".", ""): key
        for name, key in (keys | sites).items()
        if canonical[name].startswith(DENOISER)
    }
    twins = {name: averaged[full] for name, full in canonical.items() if full in averaged}
    return keys | sites | twins


def _parts_of_family(names: Iterable[str]) -> dict[str, str]:
    """Prefix -> component, for families whose original layout has its own prefixes."""
    names = list(names)
    for family in FAMILIES:
        if any(f"{root}." in name for root in family.original_blocks for name in names):
            files = [kind.single_files for kind in family.pipelines if kind.single_files]
            parts = [item for each in files for item in each.parts.items()]
            own = {prefix: part for part, prefixes in parts for prefix in prefixes}
            return {DENOISER: family.component, **own}
    return {}
