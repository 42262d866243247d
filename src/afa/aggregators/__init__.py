"""How the features of N experts become one: the fusion rules."""

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.aggregators.sabw import SABW, SABWConfig
from afa.aggregators.simple import Mean, Only, Separate

__all__ = [
    "SABW",
    "Condition",
    "Fused",
    "FusionRule",
    "Mean",
    "Only",
    "SABWConfig",
    "Separate",
    "weighted_sum",
]
