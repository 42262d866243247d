"""The trainings of the study, as jobs of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.jobs import finish, finished, log, logged, record_finished, report_progress

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


def search_job(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """Search block weights, or resume the search."""
    from afa.evaluation.search import require_same_search, search_block_weights
    from afa.evaluation.search_recipe import SearchRecipe

    checked = SearchRecipe.model_validate(recipe)
    if finished(folder) is None:
        for trial in search_block_weights(checked, folder):
            report_progress(name, trial.number, trial.num_trials)
            log(folder, {"trial": trial.number, "seconds": trial.seconds})
        record_finished(folder, {"seconds": sum(logged(folder))})
    else:
        require_same_search(checked, folder)
