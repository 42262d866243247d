"""The resumable stages of the study of distilled ensembles."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from afa.files import owned, read_json, write_atomic
from afa.studies.distillation.page import results_of, write_pages
from afa.studies.distillation.plan import (
    FULL,
    SELF,
    TEACHER,
    Settings,
    comparison,
    distill_recipe,
    prompts,
    recording_of,
    students,
    tuning,
)
from afa.studies.results.jobs import (
    Job,
    finish,
    finished,
    log,
    logged,
    record_finished,
    report_progress,
    run_jobs,
    train_aggregators_job,
    tune_base_job,
)
from afa.studies.results.plan import StudySettings, aggregator_recipes, scenes
from afa.studies.results.run import (
    SETTINGS,
    StageStarted,
    evaluate_in_processes,
    require_same_study,
)
from afa.studies.zoo_build.build import ZooRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from afa.distilling.recipe import DistillRecipe
    from afa.studies.results.jobs import JobProgress

#: steps whose time is measured
_MEASURED = 20


def run_study(
    work: Path, docs: Path, settings: Settings | None = None, num_processes: int | None = None
) -> Iterator[JobProgress | StageStarted]:
    """Record, train all students, compare them, and write the page.

    Args:
        work: work folder; that of an earlier run is resumed.
        docs: output folder of `distillation.json` and the tables in `distillation.md`.
        settings: of the study; None uses the defaults.
        num_processes: number of processes with one thread each; None uses one per core.

    Yields:
        The progress.

    Raises:
        AfaError: if the folder belongs to other settings, or a stage fails. Finished work is kept.
    """
    settings = settings or Settings()
    num_processes = num_processes or os.cpu_count() or 1
    work = work.resolve()
    inputs = json.loads(json.dumps(asdict(settings)))
    require_same_study(work, inputs)
    with owned(work):
        write_atomic(work / SETTINGS, json.dumps(inputs, indent=2) + "\n")
        yield from _stages(work, docs, settings, num_processes)


def _stages(
    work: Path, docs: Path, settings: Settings, num_processes: int
) -> Iterator[JobProgress | StageStarted]:
    write_atomic(work / "prompts.txt", "\n".join(prompts(settings)) + "\n")
    planned = students(settings)
    recipes = {student: distill_recipe(student, settings, work) for student in planned}
    mains = {recording_of(s): s for s in planned if s.row in (FULL, SELF)}
    measured = aggregator_recipes(StudySettings(num_train_steps=_MEASURED))["afa-0"]
    jobs = [
        Job(f"record {name}", record_job, (recipes[student], work / "costs" / name))
        for name, student in mains.items()
    ]
    yield from run_jobs(jobs, num_processes)
    places = {student: work / "students" / student.folder for student in planned}
    jobs = [
        Job(student.folder, distill_job, (recipe, places[student]))
        for student, recipe in recipes.items()
    ]
    jobs.append(Job("measure aggregators", train_aggregators_job, (measured, work / "measured")))
    jobs.append(_tuned("measure base", work / "measured-base", settings, 0, _MEASURED))
    yield from run_jobs(jobs, num_processes)

    costs = costs_of(work, settings)
    tuned = [work / "tuned" / f"seed-{seed}" for seed in range(settings.num_seeds)]
    num_steps = round(costs["total_seconds"] / costs["base_seconds_per_step"])
    jobs = [
        _tuned(f"tuned base {seed}", folder, settings, seed, num_steps)
        for seed, folder in enumerate(tuned)
    ]
    yield from run_jobs(jobs, num_processes)

    yield StageStarted("comparison")
    folders: dict[str, list[Path]] = {}
    for student, place in places.items():
        folders.setdefault(student.row, []).append(place)
    chosen = read_json(docs / "results.json")["chosen"]
    merges = {row: each for row, each in chosen.items() if "merge" in each}
    for subject in (FULL, TEACHER):
        recipe = comparison(settings, folders, tuned, merges, subject)
        evaluate_in_processes(work / "comparison", recipe, num_processes)
        report = (work / "comparison" / "report.json").read_text()
        write_atomic(work / f"report-{subject}.json", report)
    write_pages(docs, results_of(work, settings, {**costs, "tuned_base_steps": num_steps}))


def _tuned(name: str, folder: Path, settings: Settings, seed: int, num_steps: int) -> Job:
    """The job that tunes the base on the pictures of a seed."""
    arguments = ("zoo:base", scenes(seed).seed, tuning(settings, seed, num_steps), folder)
    return Job(name, tune_base_job, arguments)


def costs_of(work: Path, settings: Settings) -> dict[str, float]:
    """Measured costs, in seconds of one process with one thread."""
    aggregators, base = finished(work / "measured"), finished(work / "measured-base")
    recording = finished(work / "costs" / recording_of(students(settings)[0]))
    trained = finished(work / "students" / students(settings)[0].folder)
    assert aggregators is not None, "was measured"
    assert base is not None, "was measured"
    assert recording is not None, "was recorded"
    assert trained is not None, "was trained"
    parts = {
        "teacher_seconds": ZooRecipe().ensemble_steps * aggregators["seconds_per_step"],
        "recording_seconds": recording["seconds"],
        "student_seconds": settings.num_steps * trained["seconds_per_step"],
    }
    return {
        **parts,
        "total_seconds": sum(parts.values()),
        "base_seconds_per_step": base["seconds_per_step"],
        "student_seconds_per_step": trained["seconds_per_step"],
    }


def record_job(name: str, recipe: DistillRecipe, folder: Path) -> None:
    """Record a teacher's predictions, and how long that takes."""
    from afa.distilling.passes import passes_of
    from afa.distilling.recording import record_predictions
    from afa.distilling.teacher import Teacher
    from afa.training.engine import Engine

    if finished(folder) is not None:
        return
    place = recipe.recording.folder
    assert place is not None, "the study sets it"
    folder.mkdir(parents=True, exist_ok=True)
    started = None
    for event in record_predictions(Teacher.of(recipe), passes_of(recipe), place, Engine("cpu")):
        if event.stage != "record predictions" or event.total is None:
            continue
        if started is not None:
            log(folder, {"batch": event.done, "seconds": time.perf_counter() - started})
        started = time.perf_counter()
        report_progress(name, event.done, event.total)
    record_finished(folder, {"seconds": sum(logged(folder))})


def distill_job(name: str, recipe: DistillRecipe, folder: Path) -> None:
    """Train one student, or resume its training."""
    from afa.distilling.run import distill, require_same_distillation

    if finished(folder) is None:
        finish(name, distill(recipe, folder), folder)
    else:
        require_same_distillation(recipe, folder)
