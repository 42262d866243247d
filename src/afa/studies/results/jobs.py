"""Trainings of single models that only this study has, as jobs of processes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from afa.studies.jobs import finished
from afa.studies.trainings import tuned_job

if TYPE_CHECKING:
    from pathlib import Path

    from afa.training.recipe import ScenesRecipe, TrainingRecipe

#: folder of the merge where a tuned model starts
START = "start"


def lora_job(
    name: str, source: str, data: ScenesRecipe, settings: TrainingRecipe, rank: int, folder: Path
) -> None:
    """Train a LoRA on a model and merge it, or resume."""
    tuned_job(name, source, data, settings, folder, lora_rank=rank)


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
    tuned_job(name, str(start), data, settings, folder)
    shutil.rmtree(start, ignore_errors=True)
