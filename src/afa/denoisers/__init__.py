"""Denoiser families as coroutines, and where their sites are.

A new architecture is one more `Family`: a coroutine of 30 to 80 lines that reads like the family's
own forward pass, a check of what it can take apart, and an example of its input.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel

from afa.denoisers.coroutine import Blocks, Feature, run_alone, run_lockstep
from afa.denoisers.execution import PLAIN, Execution, move_all_but
from afa.denoisers.unet import check_unet, unet_blocks, unet_example, unet_layers
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Blocks",
    "Execution",
    "Family",
    "Feature",
    "Site",
    "discover_sites",
    "family_of",
    "move_all_but",
    "run_alone",
    "run_lockstep",
]


@dataclass(frozen=True)
class Family:
    """How one family of denoisers is taken apart.

    `blocks` runs the modules of `layers` through its `execution`, and all others as they are.
    """

    name: str
    model_class: Any
    blocks: Callable[..., Blocks]
    check: Callable[[Any], None]
    example: Callable[[Any], dict[str, Any]]
    layers: Callable[[Any], list[nn.Module]]


FAMILIES = (
    Family("unet", UNet2DConditionModel, unet_blocks, check_unet, unet_example, unet_layers),
)


@dataclass(frozen=True)
class Site:
    """A place where the experts' features are fused.

    Attributes:
        name: `conv_in`, `down.1.0`, `mid`, ...; the vocabulary of weights, plots and plans.
        channels: of the feature there.
        scale: how many times smaller than the latent the feature is, per side.
        temb_channels: width of the embedded timestep.
    """

    name: str
    channels: int
    scale: int
    temb_channels: int


def family_of(expert: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        AfaError: no family takes this class apart, or not these blocks.
    """
    for family in FAMILIES:
        if isinstance(expert, family.model_class):
            family.check(expert)
            return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise AfaError(
        f"An expert must be one of {known}; came a {type(expert).__name__}. "
        "Other architectures need a coroutine in afa.denoisers."
    )


def discover_sites(expert: Any) -> tuple[Site, ...]:
    """Find a denoiser's sites by running it once without data.

    The run is on the meta device: it allocates no memory and computes nothing.
    """
    family = family_of(expert)
    with torch.device("meta"), torch.no_grad():
        twin = family.model_class.from_config(copy.deepcopy(dict(expert.config)))
        inputs = family.example(twin)
        height = inputs["sample"].shape[-2]
        sites: list[Site] = []

        def note(features: Sequence[Feature]) -> torch.Tensor:
            (site, hidden, temb) = features[0]
            scale = round(height / hidden.shape[-2])
            sites.append(Site(site, hidden.shape[1], scale, temb.shape[-1]))
            return hidden

        run_lockstep([family.blocks(twin, **inputs)], note)
    return tuple(sites)
