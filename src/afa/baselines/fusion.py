"""Fusion without anything learnt: uniform averages and the control, one rule per site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.aggregators import FusionRule, Mean, Only, Separate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.denoisers import Site


def feature_mean(sites: Sequence[Site]) -> list[FusionRule]:
    """Uniform feature averaging at every site: the untrained ensemble."""
    return [Mean() for _ in sites]


def noise_mean(sites: Sequence[Site]) -> list[FusionRule]:
    """Uniform averaging of the experts' predictions; before that each goes its own way."""
    return [*(Separate() for _ in sites[:-1]), Mean()]


def shell(sites: Sequence[Site], expert: int) -> list[FusionRule]:
    """One expert in the ensemble's shell: same text path and autoencoder, nothing fused."""
    return [Only(expert) for _ in sites]
