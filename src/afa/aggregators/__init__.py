"""Fusion rules: fuse the features of N experts into one."""

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.aggregators.sabw import SABW, SABWConfig, SABWSettings
from afa.aggregators.simple import Mean, Only, Separate

__all__ = [
    "SABW",
    "Condition",
    "Fused",
    "FusionRule",
    "Mean",
    "Only",
    "SABWConfig",
    "SABWSettings",
    "Separate",
    "weighted_sum",
]
