"""The trainings of the study, as jobs of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.studies.jobs import finish, finished

if TYPE_CHECKING:
    from pathlib import Path

    from afa.training.recipe import TrainingRecipe


def tune_base_job(
    name: str, base: str, data_seed: int, settings: TrainingRecipe, folder: Path
) -> None:
    """Fine-tune the base on the scenes that the aggregators with the same seed are trained on."""
    from afa.training import SceneImages
    from afa.training.tuned_base import require_same_run, tune_base

    data = SceneImages(100_000, seed=data_seed)
    if finished(folder) is None:
        finish(name, tune_base(base, data, settings, folder), folder)
    else:
        require_same_run(data, settings, folder)
