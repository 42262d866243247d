"""Rival ways of combining checkpoints, behind the ensemble's own interface."""

from afa.baselines.fusion import feature_mean, noise_mean, shell
from afa.baselines.merge import weighted_merge

__all__ = ["feature_mean", "noise_mean", "shell", "weighted_merge"]
