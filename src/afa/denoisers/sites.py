"""The registered families, and the discovery of an architecture's sites."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.denoisers.chroma import CHROMA
from afa.denoisers.coroutine import Feature, run_lockstep
from afa.denoisers.dit import DIT
from afa.denoisers.family import Family
from afa.denoisers.flux import FLUX
from afa.denoisers.flux2 import FLUX2
from afa.denoisers.pixart import PIXART
from afa.denoisers.qwen_image import QWEN_IMAGE
from afa.denoisers.sd3 import SD3
from afa.denoisers.tokens import TEXT
from afa.denoisers.unet import UNET
from afa.denoisers.z_image import Z_IMAGE
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

FAMILIES = [UNET, FLUX2, FLUX, CHROMA, SD3, Z_IMAGE, QWEN_IMAGE, PIXART, DIT]

#: cached sites by family and configuration
_FOUND: dict[tuple[Family, str], tuple[Site, ...]] = {}


@dataclass(frozen=True)
class Site:
    """A place in a denoiser where the experts' features are fused.

    Attributes:
        name: `conv_in`, `down.1.0`, `mid`, ...; used in recorded weights, plots and plans.
        channels: the number of channels C of the feature [B, C, H, W].
        scale: the side of the model's latent divided by the side of the feature; 1 for a text.
        temb_channels: the width of the timestep embedding.
        stream: whether the feature belongs to the image, or to the text stream of a transformer.
    """

    name: str
    channels: int
    scale: int
    temb_channels: int
    stream: Literal["image", "text"] = "image"

    @property
    def block(self) -> str:
        """The name of the image site after the same block."""
        return self.name.removesuffix(TEXT)


def register_family(family: Family) -> None:
    """Register a family of denoisers, so that ensembles support it.

    A subclass of a registered family's class can be a family of its own. The most specific class is
    used.

    Raises:
        AfaError: if the family's name or class is registered already.
    """
    for known in FAMILIES:
        if family.name == known.name or family.model_class is known.model_class:
            raise AfaError(
                "AFA-MODEL-009",
                f"The family '{family.name}' ({family.model_class.__name__}) has the name or the "
                f"class of the registered family '{known.name}' ({known.model_class.__name__}). "
                "Choose another name, or use that family.",
            )
    FAMILIES.append(family)


def family_of(expert: nn.Module) -> Family:
    """Find the family of a denoiser: that of its class, or of the nearest base class.

    Raises:
        AfaError: if no family supports the class, or the family does not support its blocks.
    """
    if isinstance(own := getattr(expert, "family", None), Family):
        return own  # the expert of an ensemble of predictions
    for family in families_of_class(type(expert)):
        family.check(expert)
        return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise AfaError(
        "AFA-MODEL-010",
        f"An expert must be one of {known}; got a {type(expert).__name__}. "
        "To add an architecture, see afa.denoisers.register_family.",
    )


def families_of_class(model_class: Any) -> list[Family]:
    """The families of a denoiser class and of its base classes, the most specific first."""
    by_class = {family.model_class: family for family in FAMILIES}
    ancestors = getattr(model_class, "__mro__", ())
    return [by_class[ancestor] for ancestor in ancestors if ancestor in by_class]


def discover_sites(expert: Any) -> tuple[Site, ...]:
    """Find a denoiser's sites by running its architecture once on the meta device.

    The run allocates no memory and computes nothing. Each architecture runs once per process,
    because the Python code of the run takes time.

    Args:
        expert: a denoiser; only its class and its configuration are used.

    Returns: the sites, in the order in which the coroutine yields them.

    Raises:
        AfaError: see `family_of`.
    """
    family = family_of(expert)
    described = family.interface.config(expert)
    config = {name: value for name, value in described.items() if not name.startswith("_")}
    key = (family, json.dumps(config, sort_keys=True, default=repr))
    if key not in _FOUND:
        _FOUND[key] = _run_without_data(family, expert)
    return _FOUND[key]


def _run_without_data(family: Family, expert: Any) -> tuple[Site, ...]:
    with torch.device("meta"), torch.no_grad():
        twin = family.interface.without_data(expert, family.model_class)
        inputs = family.example(twin)
        height = family.interface.height(inputs[family.latent])
        sites: list[Site] = []

        def note(features: Sequence[Feature]) -> torch.Tensor:
            (site, hidden, temb) = features[0]
            width = temb.shape[-1]
            if site.endswith(TEXT):
                sites.append(Site(site, hidden.shape[1], 1, width, "text"))
            else:
                scale = round(height / hidden.shape[-2])
                sites.append(Site(site, hidden.shape[1], scale, width))
            return hidden

        run_lockstep([family.blocks(twin, **inputs)], note)
    return tuple(sites)
