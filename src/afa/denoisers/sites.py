"""The families there are, and the sites of an architecture."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.denoisers.coroutine import Feature, run_lockstep
from afa.denoisers.dit import DIT
from afa.denoisers.family import Family
from afa.denoisers.flux import FLUX
from afa.denoisers.pixart import PIXART
from afa.denoisers.sd3 import SD3
from afa.denoisers.tokens import TEXT
from afa.denoisers.unet import UNET
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

FAMILIES = [UNET, FLUX, SD3, PIXART, DIT]

#: the sites of each architecture that this process has met
_FOUND: dict[tuple[Family, str], tuple[Site, ...]] = {}


@dataclass(frozen=True)
class Site:
    """A place where the experts' features are fused.

    Attributes:
        name: `conv_in`, `down.1.0`, `mid`, ...; the vocabulary of weights, plots and plans.
        channels: of the feature there.
        scale: how many times smaller than the latent, as the model takes it, the feature is, per
            side; 1 for a text's.
        temb_channels: width of the embedded timestep.
        stream: of what the feature is: the picture, or the text beside it in some transformers.
    """

    name: str
    channels: int
    scale: int
    temb_channels: int
    stream: Literal["image", "text"] = "image"

    @property
    def block(self) -> str:
        """The name of the picture's site after the same block."""
        return self.name.removesuffix(TEXT)


def register_family(family: Family) -> None:
    """Let ensembles take denoisers of another family apart, from anywhere.

    A subclass of a known family's class may be a family of its own; the most specific class wins.

    Raises:
        AfaError: there is a family of that name, or of that class, already.
    """
    for known in FAMILIES:
        if family.name == known.name or family.model_class is known.model_class:
            raise AfaError(
                "AFA-MODEL-009",
                f"A family must have a name and a class of its own; '{family.name}' of "
                f"{family.model_class.__name__} meets '{known.name}' of "
                f"{known.model_class.__name__}. Choose another name, or use that one.",
            )
    FAMILIES.append(family)


def family_of(expert: nn.Module) -> Family:
    """The family of a denoiser: that of its own class, or else of the nearest class it inherits.

    Raises:
        AfaError: no family takes this class apart, or not these blocks.
    """
    for family in families_of_class(type(expert)):
        family.check(expert)
        return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise AfaError(
        "AFA-MODEL-010",
        f"An expert must be one of {known}; came a {type(expert).__name__}. "
        "Other architectures need a coroutine: see afa.denoisers.register_family.",
    )


def families_of_class(model_class: Any) -> list[Family]:
    """The families of a class of denoisers and of its ancestors, the most specific first."""
    by_class = {family.model_class: family for family in FAMILIES}
    ancestors = getattr(model_class, "__mro__", ())
    return [by_class[ancestor] for ancestor in ancestors if ancestor in by_class]


def discover_sites(expert: Any) -> tuple[Site, ...]:
    """Find a denoiser's sites by running its architecture once without data.

    The run is on the meta device: it allocates no memory and computes nothing. Its time goes into
    Python, so of each architecture there is one run in a process.

    Args:
        expert: a denoiser; of it the class and the configuration count, no weights.

    Returns: the sites in the order in which the coroutine comes to them.

    Raises:
        AfaError: see `family_of`.
    """
    family = family_of(expert)
    config = {name: value for name, value in expert.config.items() if not name.startswith("_")}
    key = (family, json.dumps(config, sort_keys=True, default=repr))
    if key not in _FOUND:
        _FOUND[key] = _run_without_data(family, config)
    return _FOUND[key]


def _run_without_data(family: Family, config: dict[str, Any]) -> tuple[Site, ...]:
    with torch.device("meta"), torch.no_grad():
        twin = family.model_class.from_config(copy.deepcopy(config))
        inputs = family.example(twin)
        latent = inputs[family.latent]
        height = latent.shape[-2] if latent.ndim == 4 else math.isqrt(latent.shape[1])
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
