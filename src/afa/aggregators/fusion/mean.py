"""Uniform averages of the experts' features at every site, or of their predictions only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from afa.aggregators import FusionRule, Mean, Separate
from afa.aggregators.fusion.recipe import FusionRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.denoisers import Site


def feature_mean(sites: Sequence[Site]) -> list[FusionRule]:
    """Uniform feature averaging at every site: the untrained ensemble."""
    return [Mean() for _ in sites]


def noise_mean(sites: Sequence[Site]) -> list[FusionRule]:
    """Uniform averaging of the experts' predictions only; earlier features are not fused."""
    return [*(Separate() for _ in sites[:-1]), Mean()]


class FeatureMeanRecipe(FusionRecipe):
    """`rule: feature_mean`, without settings; see `feature_mean`."""

    takes_drafts: ClassVar[bool] = True

    rule: Literal["feature_mean"] = "feature_mean"

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """A mean at every site."""
        return feature_mean(sites)

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row."""
        return {"feature mean": [cls()]}


class NoiseMeanRecipe(FusionRecipe):
    """`rule: noise_mean`, without settings; see `noise_mean`."""

    takes_drafts: ClassVar[bool] = True

    rule: Literal["noise_mean"] = "noise_mean"

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """A mean at the last site only."""
        return noise_mean(sites)

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row."""
        return {"noise mean": [cls()]}
