"""The resumable stages of the study of distilled ensembles."""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import is_unused, read_json, write_atomic
from afa.machine.ownership import owned
from afa.studies.distillation.page import inputs_of, require_pages, results_of, write_pages
from afa.studies.distillation.parts import Part
from afa.studies.distillation.plan import (
    MEASURED,
    NUM_MEASURED,
    RECORDED_AT_ONCE,
    TUNED,
    Settings,
    comparison,
    distill_recipe,
    merges_of,
    prompts,
    students,
    tuning,
    zoo_of,
)
from afa.studies.evaluating import StageStarted, evaluate_in_processes
from afa.studies.jobs import (
    Job,
    finish,
    finished,
    log,
    logged,
    record_finished,
    report_progress,
    run_jobs,
    train_aggregators_job,
)
from afa.studies.trainings import aggregators, scenes, tuned_job
from afa.studies.zoos import zoo_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.distilling.recipe import DistillRecipe
    from afa.studies.distillation.plan import Student
    from afa.studies.jobs import JobProgress
    from afa.studies.zoo_build.transformer import TransformerRecipe

#: the file of a work folder that says what its results depend on
_SETTINGS = "study.json"


def run_study(
    work: Path,
    docs: Path,
    settings: Settings | None = None,
    num_processes: int | None = None,
    parts: Sequence[Part] = tuple(Part),
) -> Iterator[JobProgress | StageStarted]:
    """Record, train the students of some parts, compare them, and write the page.

    Args:
        work: work folder; that of an earlier run is resumed.
        docs: folder of `distillation.json` and `distillation.md`, in which the figures and tables
            of these parts are replaced.
        settings: of the study; None uses the defaults.
        num_processes: number of processes with one thread each; None uses one per core.
        parts: the parts, in the order in which they run.

    Yields:
        The progress.

    Raises:
        AfaError: if a folder belongs to other settings, or a stage fails. Finished work is kept.
    """
    settings = settings or Settings()
    num_processes = num_processes or os.cpu_count() or 1
    work = work.resolve()
    inputs = inputs_of(settings)
    _require_same_study(work, inputs)
    require_pages(docs, settings)
    with owned(work):
        write_atomic(work / _SETTINGS, json.dumps(inputs, indent=2) + "\n")
        write_atomic(work / "prompts.txt", "\n".join(prompts(settings)) + "\n")
        for part in parts:
            yield from _run_part(part, work, docs, settings, num_processes)


def _require_same_study(work: Path, inputs: dict[str, Any]) -> None:
    """Check that a work folder is new, or of an earlier study with the same inputs.

    Raises:
        AfaError: if it is not.
    """
    path = work / _SETTINGS
    if path.exists() and read_json(path) != inputs:
        raise AfaError(
            "AFA-STUDY-004",
            f"The work folder '{work}' belongs to a study with other settings or models. Pass "
            "another folder.",
        )
    if not path.exists() and not is_unused(work):
        raise AfaError(
            "AFA-STUDY-005",
            f"The work folder '{work}' is neither new nor an earlier study. Pass another folder.",
        )


def _run_part(
    part: Part, work: Path, docs: Path, settings: Settings, num_processes: int
) -> Iterator[JobProgress | StageStarted]:
    planned = students(settings, part)
    if part == Part.TRANSFORMERS:
        yield from run_jobs(_teacher_jobs(work, settings), 1)
    if part == Part.BUDGET:
        # one after another, so that all are measured on an equally busy machine
        yield from run_jobs(_measurements(work, settings), 1)
    recipes = {student: distill_recipe(student, settings, work) for student in planned}
    yield from run_jobs(_recordings(recipes, settings), num_processes)
    places = {student: work / "students" / student.folder for student in planned}
    jobs = [
        Job(student.folder, distill_job, (recipe, places[student]))
        for student, recipe in recipes.items()
    ]
    yield from run_jobs(jobs, num_processes)

    folders: dict[str, list[Path]] = {}
    for student in planned:
        folders.setdefault(student.row, []).append(places[student])
    costs = None
    if part == Part.BUDGET:
        costs = costs_of(work, settings)
        folders[TUNED] = [work / "tuned" / f"seed-{n}" for n in range(settings.num_seeds)]
        jobs = [
            _tuned(f"tuned base {seed}", folder, settings, seed, int(costs["tuned_base_steps"]))
            for seed, folder in enumerate(folders[TUNED])
        ]
        yield from run_jobs(jobs, num_processes)
        costs["tuned_base_seconds"] = statistics.mean(
            costs["tuned_base_steps"] * _finished(folder)["seconds_per_step"]
            for folder in folders[TUNED]
        )

    yield StageStarted(f"comparison of the part '{part}'")
    recipe = comparison(part, settings, work, folders, merges_of(part))
    output = work / f"comparison-{part}"
    evaluate_in_processes(output, recipe, num_processes)
    write_pages(docs, settings, part, results_of(part, output, settings, work, costs))


def _teacher_jobs(work: Path, settings: Settings) -> list[Job]:
    """The jobs that train the transformers and their aggregators, in this order."""
    folder = zoo_of(work)
    recipe = aggregators(0, settings.num_aggregator_steps, zoo_in(folder))
    return [
        Job("transformers", build_zoo_job, (settings.transformers, folder)),
        Job("aggregators", train_aggregators_job, (recipe, folder.parent / "ensemble")),
    ]


def _measurements(work: Path, settings: Settings) -> list[Job]:
    """The jobs that measure the time of recording and of each training."""
    recipe = distill_recipe(MEASURED, settings, work)
    student = work / "students" / MEASURED.folder
    measured = aggregators(0, NUM_MEASURED)
    return [
        Job("measure recording", record_job, (recipe,)),
        Job("measure student", distill_job, (recipe, student)),
        Job(
            "measure aggregators",
            train_aggregators_job,
            (measured, work / "measured"),
        ),
        _tuned("measure base", work / "measured-base", settings, 0, NUM_MEASURED),
    ]


def _recordings(recipes: Mapping[Student, DistillRecipe], settings: Settings) -> list[Job]:
    """The jobs that record what students share: the largest number of pictures that one needs."""
    needed: dict[str, Student] = {}
    for student in recipes:
        other = needed.setdefault(student.recording, student)
        if _number(student, settings) > _number(other, settings):
            needed[student.recording] = student
    return [
        Job(f"record {name}", record_job, (recipes[student],)) for name, student in needed.items()
    ]


def _number(student: Student, settings: Settings) -> int:
    return student.number or settings.num_trajectories


def _tuned(name: str, folder: Path, settings: Settings, seed: int, num_steps: int) -> Job:
    """The job that tunes the base on the pictures of a seed."""
    arguments = ("zoo:base", scenes(seed), tuning(settings, seed, num_steps), folder)
    return Job(name, tuned_job, arguments)


def costs_of(work: Path, settings: Settings) -> dict[str, float]:
    """Measured costs, in seconds of one process with one thread; measured once."""
    path = work / "costs.json"
    if path.exists():
        return read_json(path)
    aggregators, base = _finished(work / "measured"), _finished(work / "measured-base")
    student = _finished(work / "students" / MEASURED.folder)
    recorded = logged(work / "recorded" / MEASURED.recording)
    # batches of different numbers of steps take turns
    kinds = len(settings.drawn_steps)
    per_batch = statistics.mean(statistics.median(recorded[n::kinds]) for n in range(kinds))
    parts = {
        "teacher_seconds": settings.teacher_steps * aggregators["seconds_per_step"],
        "recording_seconds": settings.num_trajectories / RECORDED_AT_ONCE * per_batch,
        "student_seconds": settings.num_steps * student["seconds_per_step"],
    }
    total = sum(parts.values())
    costs = {
        **parts,
        "total_seconds": total,
        "base_seconds_per_step": base["seconds_per_step"],
        "student_seconds_per_step": student["seconds_per_step"],
        "tuned_base_steps": round(total / base["seconds_per_step"]),
    }
    write_atomic(path, json.dumps(costs, indent=2) + "\n")
    return costs


def _finished(folder: Path) -> dict[str, Any]:
    done = finished(folder)
    assert done is not None, "its job has ended"
    return done


def build_zoo_job(name: str, recipe: TransformerRecipe, folder: Path) -> None:
    """Train the zoo of transformers, or resume its training."""
    from afa.studies.zoo_build.transformer import build_transformer_zoo

    if finished(folder) is not None:
        return
    for step in build_transformer_zoo(folder, recipe):
        report_progress(f"{name}: {step.name}", step.step, step.num_steps)
    record_finished(folder, {})


def record_job(name: str, recipe: DistillRecipe) -> None:
    """Record a teacher's predictions, and how long each batch takes."""
    from afa.distilling.passes import passes_of
    from afa.distilling.recording import record_predictions
    from afa.distilling.teacher import Teacher
    from afa.training.engine import Engine

    place = recipe.recording.folder
    assert place is not None, "the study sets it"
    place.mkdir(parents=True, exist_ok=True)
    started = None
    for event in record_predictions(Teacher.of(recipe), passes_of(recipe), place, Engine("cpu")):
        if event.stage != "record predictions" or event.total is None:
            continue
        if started is not None:
            log(place, {"batch": event.done, "seconds": time.perf_counter() - started})
        started = time.perf_counter()
        report_progress(name, event.done, event.total)


def distill_job(name: str, recipe: DistillRecipe, folder: Path) -> None:
    """Train one student, or resume its training."""
    from afa.distilling.run import distill, require_same_distillation

    if finished(folder) is None:
        finish(name, distill(recipe, folder), folder)
    else:
        require_same_distillation(recipe, folder)
