"""Rival ways of combining checkpoints, behind the ensemble's own interface."""

from afa.baselines.fusion import feature_mean, noise_mean, shell
from afa.baselines.hand_over import HandOver
from afa.baselines.magic_fusion import MagicFusion, magic_fusion
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
