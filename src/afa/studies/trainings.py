"""Trainings on the scenes of a zoo that studies and benchmarks share."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from afa.aggregators import SABWSettings
from afa.loading.expert_source import ExpertSource
from afa.studies.jobs import finish, finished
from afa.studies.zoos import SHIPPED
from afa.training.recipe import DataRecipe, Recipe, ScenesRecipe, TrainingRecipe
from afa.zoo.models import AGGREGATOR

if TYPE_CHECKING:
    from pathlib import Path

    from afa.studies.zoos import Zoo
    from afa.training.data import CaptionedImages

#: length of a training, if nothing else is said
NUM_STEPS = 500


def training(seed: int, num_steps: int = NUM_STEPS, **changes: Any) -> TrainingRecipe:
    """Settings of one training of aggregators or of the base."""
    values = {
        "num_steps": num_steps,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "num_warmup_steps": min(50, num_steps),
        "learning_rate_schedule": "cosine",
        "checkpoint_every": 100,
        "trackers": [],
        "seed": seed,
    }
    return TrainingRecipe(**{**values, **changes})


def scenes(seed: int) -> ScenesRecipe:
    """The data of one seed: all pairs of objects that are not held out."""
    return ScenesRecipe(num_samples=100_000, seed=seed + 3)


def aggregators(
    seed: int, num_steps: int = NUM_STEPS, zoo: Zoo = SHIPPED, **changes: Any
) -> Recipe:
    """The recipe of one training of aggregators, of the shipped ones' shape.

    Args:
        seed: of the training and its data.
        num_steps: its length.
        zoo: the experts.
        changes: other settings of the training.
    """
    chosen = {field.name: getattr(AGGREGATOR, field.name) for field in fields(SABWSettings)}
    return Recipe(
        experts=[ExpertSource(source) for source in zoo.experts.values()],
        data=DataRecipe(scenes=scenes(seed)),
        aggregator=SABWSettings(**chosen),
        training=training(seed, num_steps, **changes),
    )


def tuned_job(
    name: str, source: str, data: ScenesRecipe, settings: TrainingRecipe, folder: Path, **how: Any
) -> None:
    """Fine-tune all weights of a model, or resume; `how` is passed on to `tune_base`."""
    from afa.training.tuned_base import require_same_run, tune_base

    opened = open_scenes(data)
    if finished(folder) is None:
        finish(name, tune_base(source, opened, settings, folder, **how), folder)
    else:
        require_same_run(opened, settings, folder, **how)


def open_scenes(data: ScenesRecipe) -> CaptionedImages:
    """Open the scenes of a recipe."""
    from afa.training.data import open_data
    from afa.training.data.scenes import SceneImages

    opened = open_data(DataRecipe(scenes=data))
    assert isinstance(opened, SceneImages), "it has scenes"
    return opened
