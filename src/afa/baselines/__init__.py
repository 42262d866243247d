"""Rival ways of combining checkpoints, behind the ensemble's own interface."""

from afa.baselines.fusion import (
    HandOver,
    MagicFusion,
    feature_mean,
    magic_fusion,
    noise_mean,
    shell,
)
from afa.baselines.merge import merge_models, weighted_merge

__all__ = [
    "HandOver",
    "MagicFusion",
    "feature_mean",
    "magic_fusion",
    "merge_models",
    "noise_mean",
    "shell",
    "weighted_merge",
]
