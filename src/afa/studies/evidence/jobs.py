"""The trainings of single models, as jobs of processes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from afa.studies.jobs import finish, finished

if TYPE_CHECKING:
    from pathlib import Path

    from afa.training.data import CaptionedImages
    from afa.training.recipe import ScenesRecipe, TrainingRecipe

#: folder of the merge where a tuned model starts
START = "start"


def tuned_job(
    name: str, source: str, data: ScenesRecipe, settings: TrainingRecipe, folder: Path
) -> None:
    """Fine-tune all weights of a model, or resume."""
    _tune(name, source, data, settings, folder)


def lora_job(
    name: str, source: str, data: ScenesRecipe, settings: TrainingRecipe, rank: int, folder: Path
) -> None:
    """Train a LoRA on a model and merge it, or resume."""
    _tune(name, source, data, settings, folder, lora_rank=rank)


def merged_job(
    name: str,
    merge: dict[str, Any],
    data: ScenesRecipe,
    settings: TrainingRecipe,
    folder: Path,
) -> None:
    """Merge the experts, and fine-tune the result, or resume."""
    from afa.merging import MergeRecipe
    from afa.merging.run import merge_checkpoints

    start = folder.with_name(f"{folder.name}-{START}")
    if finished(folder) is None and not start.exists():
        for _ in merge_checkpoints(MergeRecipe.model_validate(merge), start):
            pass
    _tune(name, str(start), data, settings, folder)
    shutil.rmtree(start, ignore_errors=True)


def _tune(
    name: str,
    source: str,
    data: ScenesRecipe,
    settings: TrainingRecipe,
    folder: Path,
    **changes: Any,
) -> None:
    from afa.training.tuned_base import require_same_run, tune_base

    scenes = open_scenes(data)
    if finished(folder) is None:
        finish(name, tune_base(source, scenes, settings, folder, **changes), folder)
    else:
        require_same_run(scenes, settings, folder, **changes)


def open_scenes(data: ScenesRecipe) -> CaptionedImages:
    """Open the scenes of a recipe, which are the data of all trainings in a world."""
    from afa.training.data import open_data
    from afa.training.data.scenes import SceneImages
    from afa.training.recipe import DataRecipe

    opened = open_data(DataRecipe(scenes=data))
    assert isinstance(opened, SceneImages), "it has scenes"
    return opened
