"""Training of the aggregators: data, objective, loop."""

from afa.training.data import CaptionedImages, FolderImages, SceneImages, open_data
from afa.training.loop import TrainStep, seeded, train, train_aggregators
from afa.training.objective import denoising_loss, noise_and_target, training_scheduler

__all__ = [
    "CaptionedImages",
    "FolderImages",
    "SceneImages",
    "TrainStep",
    "denoising_loss",
    "noise_and_target",
    "open_data",
    "seeded",
    "train",
    "train_aggregators",
    "training_scheduler",
]
