"""Write the student of a checkpoint, also while its distillation goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.distilling.passes import passes_of
from afa.distilling.recipe import DistillRecipe, StudentTraining
from afa.distilling.run import save_student, validated
from afa.distilling.student import Student, load_student
from afa.distilling.teacher import Teacher
from afa.files import read_json, staged
from afa.recipe import validated as validated_recipe
from afa.training.continuing import RECIPE
from afa.training.exported import (
    lines_about,
    read_checkpoint,
    require_models,
    require_new,
    weights_of,
)

if TYPE_CHECKING:
    from pathlib import Path


def export_student(run: Path, output: Path, *, step: int | None = None, best: bool = False) -> int:
    """Write the student of a checkpoint of `afa distill`, as at the end of the distillation.

    The run may be in progress. The models that the recipe names are loaded again, but nothing is
    recorded. With `ema_decay`, the student has the averaged weights.

    Args:
        run: the folder of the distillation.
        output: a new folder.
        step: of the checkpoint; None uses the newest.
        best: see `afa.training.exported.export_checkpoint`.

    Returns: the step of the checkpoint.

    Raises:
        AfaError: if there is no such checkpoint, it is damaged, the models changed, or the output
            exists.
    """
    require_new(output)
    written = read_json(run / RECIPE)
    found = read_checkpoint(run, step)
    training = written.get("training") or {}
    known = {key: value for key, value in training.items() if key not in StudentTraining.REFUSED}
    recipe = validated_recipe({**written, "training": known}, DistillRecipe, run / RECIPE)
    teacher = Teacher.of(recipe)
    pipeline, hashes = load_student(teacher, recipe.student)
    student = Student(
        pipeline,
        recipe.student,
        hashes,
        recipe.training.seed,
        torch.device("cpu"),
        recipe.features,
    )
    require_models(found, student.identities(), run)
    names = [name for name, _ in student.named()]
    student.load(weights_of(found, student.name, names, best=best))
    losses = [(at, loss) for at, loss in validated(run) if at <= found.step]
    lines = lines_about(run, written, found.step, best=best)
    with staged(output) as partial:
        partial.mkdir()
        save_student(recipe, teacher, passes_of(recipe), student, partial, losses, lines)
    return found.step
