"""A distillation from a recipe to the student's files."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.distilling.card import CARD, card_of, record_of
from afa.distilling.lora_files import write_loras
from afa.distilling.passes import passes_of
from afa.distilling.planned import plan_of_distillation
from afa.distilling.predictions import LiveTexts, RecordedExamples, Source
from afa.distilling.recipe import BakeIn
from afa.distilling.recording import read_rows, record_predictions
from afa.distilling.student import Student, load_student, require_fit
from afa.distilling.teacher import Teacher
from afa.errors import AfaError
from afa.files import is_unused, read_json, write_atomic
from afa.loading.scheduler_choice import require_scheduler
from afa.loading.student_record import ENTRY, RECORD
from afa.machine.ownership import owned
from afa.training.cache import CacheProgress, TextCache
from afa.training.changing import (
    History,
    changes_between,
    require_changeable,
    require_run,
    said_of,
)
from afa.training.checkpoints import Checkpoints, newest_step
from afa.training.continuing import RECIPE, digest, essence
from afa.training.engine import Engine
from afa.training.loop import TrainStep
from afa.training.order import Purpose
from afa.training.record import entries_of, require_trackers
from afa.training.run import CHECKPOINTS
from afa.training.stopping import Stopped
from afa.training.trainer import Trainer
from afa.training.tuned_base import save_pipeline
from afa.training.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from afa.distilling.passes import Pass
    from afa.distilling.predictions import Rows, Texts
    from afa.distilling.recipe import DistillRecipe

RECORDED, _TEXTS = "recorded", "texts"
_SETTINGS = "the settings"
#: settings that may change when a run is resumed
_FREE: dict[str, tuple[str, ...] | None] = {
    "recording": ("folder", "max_disk"),
    "previews": None,
    "validation": ("every",),
}


def distill(
    recipe: DistillRecipe,
    output: Path,
    *,
    should_stop: Callable[[], bool] | None = None,
    continue_with: bool = False,
) -> Iterator[TrainStep | CacheProgress]:
    """Distil a teacher into a student: record predictions, train, and write the student.

    `output` becomes a stock pipeline folder, or has LoRA files, with a model card and the record
    `distill.json`. The same call resumes an interrupted run at the last batch or checkpoint, and
    its results are the same bytes. Several processes share the recording and the samples of a step.

    Args:
        recipe: the distillation.
        output: a new folder, or that of an earlier run of this recipe.
        should_stop: called after each batch and step; if it returns True, the run saves and raises
            `Stopped`.
        continue_with: continue an earlier run with other settings of its training; see
            `afa.training.train`.

    Yields: progress of the recording, then the steps.

    Raises:
        AfaError: before anything is written, if the folder contains something else, a part of the
            recipe cannot be loaded, or the student does not fit the teacher; later, as
            `record_predictions` and `afa.training.train`.
        Stopped: if `should_stop` returned True.
    """
    settings = recipe.training
    engine = Engine(settings.device)
    history = require_same_distillation(recipe, output, continue_with=continue_with)
    require_trackers(settings.trackers)
    if recipe.previews is not None:  # the student has the teacher's noise schedule
        require_scheduler(plan_of_distillation(recipe), recipe.previews.scheduler)
    teacher = Teacher.of(recipe)
    require_fit(teacher, recipe.student)
    passes = passes_of(recipe)
    engine.wait()  # so that all processes have checked the folder before one writes
    folder = recipe.recording.folder or output / RECORDED
    with owned(output) if engine.is_main else nullcontext():
        if engine.is_main:
            history.write(output)
            write_atomic(
                output / RECIPE, json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n"
            )

        def stop() -> None:
            if should_stop is not None and should_stop():
                raise Stopped(0, settings.num_steps)

        yield from record_predictions(teacher, passes, folder, engine, stop)
        rows = [read_rows(each, folder, recipe.recording.batch_size) for each in passes]
        yield CacheProgress("load the student", 0, None)
        pipeline, hashes = load_student(teacher, recipe.student)
        student = Student(
            pipeline, recipe.student, hashes, settings.seed, engine.device, recipe.features
        )
        texts: Texts = LiveTexts(pipeline)
        if not recipe.student.text_encoder:
            captions = sorted({caption for each in rows for caption in each.captions()})
            cache = TextCache(output / _TEXTS, pipeline, captions)
            yield from cache.build(engine.rank, engine.num_processes)
            engine.wait()
            texts = cache
        checkpoints = Checkpoints(output / CHECKPOINTS, settings.keep_checkpoints)
        trainer = Trainer(pipeline, student, settings, engine, checkpoints)
        trainer.bind(
            _inputs(recipe, passes, teacher), {_SETTINGS} if history.has_changed_here else ()
        )
        training, validation = _examples(recipe, rows, texts, student, engine)
        with Watch(recipe, output, trainer, validation, history) as watch:
            yield from watch.steps(training, should_stop)
        trainer.finish()
        if engine.is_main:
            losses = validated(output)
            save_student(recipe, teacher, passes, student, output, losses, watch.summary)
            shutil.rmtree(output / _TEXTS, ignore_errors=True)
        engine.wait()


def require_same_distillation(
    recipe: DistillRecipe, output: Path, *, continue_with: bool = False
) -> History:
    """Check that a folder is new, or of an earlier run of this recipe.

    Args:
        recipe: of this start.
        output: the folder.
        continue_with: whether settings of the training may be changed on purpose.

    Returns: the recipes of the run, with this one.

    Raises:
        AfaError: if it is not; names the differing settings with both values.
    """
    now, written = recipe.model_dump(mode="json"), output / RECIPE
    if continue_with:
        require_run(written)
    before = read_json(written) if written.is_file() and not is_unused(output) else None
    changes = [] if before is None else changes_between(before, now, _FREE)
    if continue_with:
        require_changeable(changes, output)
    elif changes or (before is None and not is_unused(output)):
        found = "is not empty and has no distillation"
        if changes:
            found = f"has a distillation with another {said_of(changes)}"
        raise AfaError(
            "AFA-DISTILL-015",
            f"The output folder '{output}' {found}. Pass a new folder, or one of an earlier run of "
            "this recipe; recording.folder lets runs share recorded predictions.",
        )
    return History.of(output, before, now, newest_step(output / CHECKPOINTS), _FREE)


def _inputs(recipe: DistillRecipe, passes: Sequence[Pass], teacher: Teacher) -> dict[str, str]:
    """Return hashes of all inputs of a step, by the name that errors use."""
    numbers = {each.name: [each.num_items, each.inputs] for each in passes}
    plain = essence(recipe.model_dump(mode="json"), _FREE)
    return {
        "the teacher": digest(teacher.identity()),
        "the recorded predictions": digest(numbers),
        _SETTINGS: digest([plain[key] for key in ("training", "student", "guidance")]),
    }


def _examples(
    recipe: DistillRecipe,
    rows: Sequence[Rows],
    texts: Texts,
    student: Student,
    engine: Engine,
) -> tuple[RecordedExamples, RecordedExamples | None]:
    """Return the examples for training and for validation.

    Raises:
        AfaError: if there are too few predictions to hold out.
    """
    bake_in = recipe.guidance.bake_in if isinstance(recipe.guidance, BakeIn) else None
    common: dict[str, Any] = {
        "bake_in": bake_in,
        "feature_loss": None if recipe.features is None else student.feature_loss,
        "seed": recipe.training.seed,
        "device": engine.device,
    }
    held_out, first = np.empty(0, dtype=np.int64), rows[0]
    num_items = (recipe.trajectories or recipe.pictures).number  # type: ignore[union-attr]
    count = 0
    if recipe.validation is not None:
        wanted = recipe.validation.num_samples
        while len(held_out) < wanted:
            count += 1
            if count >= num_items:
                raise AfaError(
                    "AFA-DISTILL-016",
                    f"validation.num_samples is {wanted}, for which {num_items} recorded pictures "
                    "are too few. Lower it, or record more.",
                )
            held_out = first.of_items(range(num_items - count, num_items))
        held_out = held_out[np.linspace(0, len(held_out) - 1, wanted).round().astype(int)]
    used = first.of_items(range(num_items - count))
    others = [Source(each, np.arange(len(each))) for each in rows[1:]]
    training = RecordedExamples(
        [Source(first, used), *others],
        texts,
        share=(recipe.pictures and recipe.pictures.share) or 0.0,
        caption_dropout=recipe.caption_dropout,
        **common,
    )
    if recipe.validation is None:
        return training, None
    validation = RecordedExamples(
        [Source(first, held_out)], texts, purpose=Purpose.VALIDATION, **common
    )
    return training, validation


def save_student(
    recipe: DistillRecipe,
    teacher: Teacher,
    passes: Sequence[Pass],
    student: Student,
    output: Path,
    losses: Sequence[tuple[int, float]],
    summary: Sequence[str],
) -> None:
    """Write the student's files, its record and its model card.

    Args:
        recipe: of the distillation.
        teacher: the teacher.
        passes: the recorded sources.
        student: with its final weights.
        output: an existing folder.
        losses: steps and their validation losses.
        summary: sentences about the training.
    """
    record = record_of(recipe, teacher, passes, student.identities(), losses)
    if summary:
        record["history"] = list(summary)
    text = json.dumps(record, indent=2) + "\n"
    files: list[Path] = []
    if student.rank is not None:
        metadata = {"modelspec.title": output.name, ENTRY: text}
        files = write_loras(student, output, metadata)
    write_atomic(output / RECORD, text)
    write_atomic(output / CARD, card_of(record, output, files))
    if student.rank is None:
        for name, part in student.pipeline.components.items():
            if name.startswith("tokenizer") and getattr(part, "is_fast", False):
                # the last call set these, so the file would depend on it
                part.backend_tokenizer.no_padding()
                part.backend_tokenizer.no_truncation()
        save_pipeline(student.pipeline, output)


def validated(output: Path) -> list[tuple[int, float]]:
    """Return the steps and validation losses of a run."""
    entries = entries_of(output, "validation_loss")
    return [(entry["step"], entry["validation_loss"]) for entry in entries]
