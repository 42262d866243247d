"""Training of the aggregators: data, cache, objective, steps, checkpoints, monitoring."""

from afa.training.buckets import Buckets
from afa.training.cache import CacheProgress
from afa.training.checkpoints import Checkpoints
from afa.training.data import CaptionedImages, FolderImages, SceneImages, open_data
from afa.training.engine import pick_device
from afa.training.exported import export_checkpoint
from afa.training.loop import TrainStep, seeded
from afa.training.objective import denoising_loss
from afa.training.recipe import Recipe, TrainingRecipe, load_recipe
from afa.training.run import train
from afa.training.stopping import Stopped, stop_on_signals
from afa.training.trainer import train_aggregators
from afa.training.transform import BucketTransform, Transform

__all__ = [
    "BucketTransform",
    "Buckets",
    "CacheProgress",
    "CaptionedImages",
    "Checkpoints",
    "FolderImages",
    "Recipe",
    "SceneImages",
    "Stopped",
    "TrainStep",
    "TrainingRecipe",
    "Transform",
    "denoising_loss",
    "export_checkpoint",
    "load_recipe",
    "open_data",
    "pick_device",
    "seeded",
    "stop_on_signals",
    "train",
    "train_aggregators",
]
