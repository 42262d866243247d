"""The resumable stages of the study."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from afa.errors import AfaError
from afa.files import is_unused, read_json, write_atomic
from afa.loading.identity import hash_descriptions
from afa.loading.sources import locate
from afa.loading.weights import hash_pipeline
from afa.machine.ownership import owned
from afa.studies.evaluating import StageStarted, evaluate_in_processes
from afa.studies.jobs import (
    Job,
    JobProgress,
    finished,
    run_jobs,
    search_job,
    train_aggregators_job,
)
from afa.studies.results.jobs import tune_base_job
from afa.studies.results.page import results_of, write_pages, write_section
from afa.studies.results.plan import (
    FEWER,
    SHIPPED,
    STEPS,
    TIME,
    StudySettings,
    Zoo,
    aggregator_recipes,
    candidates,
    comparison_recipe,
    scenes,
    search_recipe,
    training,
    tuning_recipe,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SETTINGS = "study.json"


def run_study(
    work: Path,
    docs: Path,
    settings: StudySettings | None = None,
    num_processes: int | None = None,
    zoo: Zoo = SHIPPED,
    students: Mapping[str, Sequence[Path]] | None = None,
) -> Iterator[JobProgress | StageStarted]:
    """Train, tune the baselines, compare all methods, and write the pages.

    Args:
        work: work folder; that of an earlier run is resumed.
        docs: output folder of `results.md`, `results.json` and figures.
        settings: settings of the study; None uses the defaults of the zoo.
        num_processes: number of processes with one thread each; None uses one per core.
        zoo: the experts.
        students: folders of distilled models, by row; None for none.

    Yields:
        The progress.

    Raises:
        AfaError: if the folder belongs to other settings, or a stage fails. Finished work is kept.
    """
    settings = settings or (StudySettings() if zoo.is_main else FEWER)
    num_processes = num_processes or os.cpu_count() or 1
    work = work.resolve()
    inputs = {
        **json.loads(json.dumps(asdict(settings))),
        "models": [
            [hash_pipeline(path), hash_descriptions(path)]
            for path in map(locate, (zoo.base, *zoo.experts.values()))
        ],
    }
    require_same_study(work, inputs)
    with owned(work):
        write_atomic(work / SETTINGS, json.dumps(inputs, indent=2) + "\n")
        yield from _stages(work, docs, settings, num_processes, zoo, students or {})


def _stages(
    work: Path,
    docs: Path,
    settings: StudySettings,
    num_processes: int,
    zoo: Zoo,
    students: Mapping[str, Sequence[Path]],
) -> Iterator[JobProgress | StageStarted]:
    recipes = aggregator_recipes(settings, zoo)
    trained = {name: work / "trained" / _folder(name) for name in recipes}
    jobs = [
        Job(name, train_aggregators_job, (recipe, trained[name]))
        for name, recipe in recipes.items()
    ]
    rates = {f"{STEPS} {rate:g}": rate for rate in settings.base_learning_rates}
    bases = {name: work / "tuned" / _folder(name) for name in rates}
    jobs += [
        Job(name, tune_base_job, _tuning(settings, zoo, 0, rates[name], folder))
        for name, folder in bases.items()
    ]
    if zoo.is_main:
        jobs.append(Job("autoMBW", search_job, (search_recipe(settings, zoo), work / "search")))
    # the longest jobs first, so that all processes finish at about the same time
    jobs.sort(key=lambda job: job.name != "autoMBW" and "twice" not in job.name)
    yield from run_jobs(jobs, num_processes)

    yield StageStarted("tuning of the baselines")
    evaluate_in_processes(work / "tuning", tuning_recipe(settings, bases, zoo), num_processes)
    chosen, rate_name = choose(read_json(work / "tuning" / "report.json"), settings, zoo)
    if zoo.is_main:
        chosen["autoMBW"] = {"merge": _searched(work / "search")}
    rate = rates[rate_name]

    seeds = range(settings.num_seeds)
    tuned = {STEPS: [bases[rate_name]], TIME: []}
    later = []
    for seed in seeds:
        num_steps = _steps_of_equal_time(work, settings, trained[f"afa-{seed}"], bases[rate_name])
        runs = {TIME: num_steps} if seed == 0 else {TIME: num_steps, STEPS: None}
        for row, steps in runs.items():
            folder = work / "tuned" / _folder(f"{row} {seed}")
            tuned[row].append(folder)
            arguments = _tuning(settings, zoo, seed, rate, folder, steps)
            later.append(Job(f"{row} {seed}", tune_base_job, arguments))
    later.sort(key=lambda job: TIME not in job.name)
    yield from run_jobs(later, num_processes)

    yield StageStarted("comparison")
    recipe = comparison_recipe(settings, trained, tuned, chosen, zoo, students)
    evaluate_in_processes(work / "comparison", recipe, num_processes)
    costs = training_costs(settings, trained, tuned)
    if zoo.is_main:
        costs["autoMBW"] = search_cost(settings, work / "search")
    write = write_pages if zoo.is_main else write_section
    write(docs, results_of(work, settings, chosen, costs, rate), work / "comparison")


def _folder(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")


def _tuning(
    settings: StudySettings,
    zoo: Zoo,
    seed: int,
    rate: float,
    folder: Path,
    steps: int | None = None,
) -> tuple[Any, ...]:
    changes: dict[str, Any] = {"learning_rate": rate}
    if steps is not None:
        changes["num_steps"] = steps
    return zoo.base, scenes(seed).seed, training(settings, seed, **changes), folder


def require_same_study(work: Path, inputs: dict[str, Any]) -> None:
    """Check that a work folder is new, or of an earlier study with the same inputs.

    Raises:
        AfaError: if it is not.
    """
    path = work / SETTINGS
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


def choose(
    report: dict[str, Any], settings: StudySettings, zoo: Zoo = SHIPPED
) -> tuple[dict[str, dict[str, Any]], str]:
    """Select the best settings of each baseline and the best tuned base; ties select the first.

    Args:
        report: report of the comparison of all candidates.
        settings: settings of the study, with the learning rates of the bases.
        zoo: the experts.

    Returns:
        The settings by baseline, and the name of the tuned base.
    """
    means = {
        row["method"]: row["groups"]["mixed"]["scores"]["both"]["mean"] for row in report["rows"]
    }
    chosen = {}
    for name, listed in candidates(zoo).items():
        scores = [means[f"{name} {n}"] for n in range(len(listed))]
        chosen[name] = listed[scores.index(max(scores))]
    bases = [f"{STEPS} {rate:g}" for rate in settings.base_learning_rates]
    return chosen, max(bases, key=lambda name: means[name])


def _searched(folder: Path) -> dict[str, Any]:
    """The merge that the search found, as in the recipe of a method."""
    found = yaml.safe_load((folder / "merge.yaml").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("method", "block_weights")}


def _steps_of_equal_time(work: Path, settings: StudySettings, ensemble: Path, base: Path) -> int:
    """The number of steps of the base that take as long as training an ensemble; measured once."""
    path = work / "tuned" / f"steps-{ensemble.name}.json"
    if not path.exists():
        slow, fast = finished(ensemble), finished(base)
        assert slow is not None, "the ensemble has been trained"
        assert fast is not None, "the base has been tuned"
        ratio = slow["seconds_per_step"] / fast["seconds_per_step"]
        content = {"num_steps": round(settings.num_train_steps * ratio)}
        write_atomic(path, json.dumps(content) + "\n")
    return int(read_json(path)["num_steps"])


def training_costs(
    settings: StudySettings, trained: dict[str, Path], tuned: dict[str, list[Path]]
) -> dict[str, dict[str, float]]:
    """Training steps and seconds of each trained row, for one seed."""
    costs = {}
    for name, folder in trained.items():
        note = finished(folder)
        assert note is not None, "the ensemble has been trained"
        seconds = settings.num_train_steps * note["seconds_per_step"]
        costs[name] = {"num_steps": settings.num_train_steps, "seconds": seconds}
    for row, folders in tuned.items():
        note, run = finished(folders[-1]), read_json(folders[-1] / "run.json")
        assert note is not None, "the base has been tuned"
        steps = run["training"]["num_steps"]
        costs[row] = {"num_steps": steps, "seconds": steps * note["seconds_per_step"]}
    return costs


def search_cost(settings: StudySettings, search: Path) -> dict[str, float]:
    """Trials and seconds of the search."""
    note = finished(search)
    assert note is not None, "the search has finished"
    return {"num_trials": settings.num_trials, "seconds": note["seconds"]}
