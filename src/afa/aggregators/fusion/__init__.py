"""Fusion without training; every module in this folder adds a method to all comparisons."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from afa.aggregators.fusion.hand_over import HandOver
from afa.aggregators.fusion.loratorio import LoRAtorio
from afa.aggregators.fusion.magic_fusion import MagicFusion, magic_fusion
from afa.aggregators.fusion.mean import feature_mean, noise_mean
from afa.aggregators.fusion.nearest import NearestToBase
from afa.aggregators.fusion.recipe import FusionRecipe
from afa.aggregators.fusion.shell import ShellRecipe, shell

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

#: the recipe classes of all methods, in the order of their modules
FUSIONS = tuple(FusionRecipe.__subclasses__())

if TYPE_CHECKING:
    AnyFusion = FusionRecipe
else:
    #: a method in a recipe, identified by its `rule`
    AnyFusion = Annotated[Union[FUSIONS], Field(discriminator="rule")]  # noqa: UP007

__all__ = [
    "FUSIONS",
    "AnyFusion",
    "FusionRecipe",
    "HandOver",
    "LoRAtorio",
    "MagicFusion",
    "NearestToBase",
    "ShellRecipe",
    "feature_mean",
    "magic_fusion",
    "noise_mean",
    "shell",
]
