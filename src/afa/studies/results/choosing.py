"""The settings of the rivals, chosen on tuning prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from afa.evaluation.recipe import slug
from afa.evaluation.work import digest
from afa.files import read_json, write_atomic
from afa.provenance import commit, processor
from afa.studies.evaluating import StageStarted, evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, search_job
from afa.studies.results.candidates import NUM_TRIALS, SEARCHED, Grid, fusions, merges
from afa.studies.results.comparison import write_prompts
from afa.studies.results.development import MOST_WIDENINGS, widened
from afa.studies.results.drawn import drawn_job
from afa.studies.results.entrants import Tuned
from afa.studies.results.rivals.superdiff import candidates
from afa.studies.results.rows import LORA, MERGED, TUNED, counted, of_pictures
from afa.studies.results.study import (
    FIRST,
    best_merge,
    chosen_rates,
    inputs_of_choice,
    inputs_of_lengths,
    train_all,
)
from afa.studies.worlds.prompts import groups_of, prompts_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from afa.studies.jobs import JobProgress
    from afa.studies.results.entrants import Place
    from afa.studies.results.rivals.superdiff import SuperDiff
    from afa.studies.results.settings import StudySettings
    from afa.studies.results.study import Study


def choose_rivals(study: Study, world: str) -> Iterator[JobProgress | StageStarted]:
    """Choose the settings of the rivals on the tuning prompts of a world.

    Only merges, if it is not the first world. There, block weights are searched, too, and the
    learning rates of all tuned models are chosen at their shortest length; then that of the tuned
    merge, which starts from the best one. What is chosen already is not chosen again, unless its
    number of candidates has changed. New rivals are added.
    """
    path = study.chosen_in / f"{world}.json"
    known = study.chosen(world) if path.exists() else {"rivals": {}, "drawn": {}}
    place, is_first = study.place(world), world == FIRST
    grids = merges(len(place.experts)) | (fusions(list(place.experts)) if is_first else {})
    drawn = candidates(place) if is_first else {}

    def is_new(kind: str, row: str, count: int) -> bool:
        found = known[kind].get(row)
        # one candidate alone has no score
        return found is None or len(found["scores"] or [None]) != count

    grids = {row: each for row, each in grids.items() if is_new("rivals", row, len(each.methods))}
    if is_first and is_new("rivals", SEARCHED, 1):
        grids[SEARCHED] = yield from _searched(study, place)
    drawn = {row: each for row, each in drawn.items() if is_new("drawn", row, len(each))}
    if not grids and not drawn:
        return
    methods = [
        {"name": f"{row} {n}", **method}
        for row, grid in grids.items()
        for n, method in enumerate(grid.methods)
        if len(grid.methods) > 1 or row == SEARCHED
    ]
    name = f"tuning-{digest([*grids, *drawn])}" if path.exists() else "tuning"
    report = yield from compare_candidates(study, place, name, methods, [], drawn)
    origin = {"commit": commit(), "machine": processor()}
    added = {
        "rivals": choose(report, grids),
        "drawn": {row: _best_drawn(report, row, each) for row, each in drawn.items()},
    }
    chosen = {**origin, **known}
    for kind, rivals in added.items():
        later = origin if path.exists() else {}
        chosen[kind] = known[kind] | {row: {**each, **later} for row, each in rivals.items()}
    if is_first:
        chosen["rates"] = yield from _rates(study, place, known, best_merge(chosen))
    chosen["inputs"] = inputs_of_choice(study.settings)
    study.chosen_in.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(chosen, indent=1) + "\n")


def _searched(study: Study, place: Place) -> Generator[JobProgress, None, Grid]:
    """The merge whose block weights a search found on the tuning prompts, as the only candidate."""
    prompts = tuning_prompts(place, study.settings.num_tuning)
    recipe = {
        "experts": list(place.experts.values()),
        "prompts": {"drawbench": str(write_prompts(place.work / "tuning.csv", prompts))},
        "sampling": sampling(study.settings.num_steps),
        "metric": "scenes",
        "num_trials": NUM_TRIALS,
    }
    folder = place.work / "tuning-search"
    yield from run_jobs([Job(f"{place.world}: {SEARCHED}", search_job, (recipe, folder))], 1)
    found = yaml.safe_load((folder / "merge.yaml").read_text(encoding="utf-8"))
    merge = {key: found[key] for key in ("method", "block_weights")}
    return Grid([{}], [{"merge": merge}])


def _rates(
    study: Study, place: Place, known: Mapping[str, Any], merge: Mapping[str, Any]
) -> Generator[JobProgress | StageStarted, None, dict[str, Any]]:
    """The learning rates of tuned models; that of the tuned merge again if the merge is new."""
    rates: dict[str, Any] = known.get("rates", {})
    if not rates:
        tried = rate_candidates(study.settings)
        rates = yield from _choose_rates(study, place, "tuning-rates", tried)
    if "rates" in known and best_merge(known) == merge:
        return rates
    merged = rate_candidates(study.settings, merge)
    of_merged = yield from _choose_rates(study, place, "tuning-merged", merged)
    return {**rates, **of_merged}


def _choose_rates(
    study: Study, place: Place, name: str, tried: dict[str, list[Tuned]]
) -> Generator[JobProgress | StageStarted, None, dict[str, Any]]:
    """Choose learning rates, and try one more beyond the best one while it is at an end.

    Returns: by row, the best rate, the scores of all, and whether it is still the first or last.
    """
    for extension in range(MOST_WIDENINGS + 1):
        listed = [each for several in tried.values() for each in several]
        report = yield from compare_candidates(study, place, name, [], listed)
        found = {row: _best_rate(report, each) for row, each in tried.items()}
        further = {
            row: widened([each.rate for each in listed], found[row]["rate"])
            for row, listed in tried.items()
        }
        if extension == MOST_WIDENINGS or not any(further.values()):
            break
        for row, rate in further.items():
            if rate is not None:
                first = tried[row][0]
                tried[row].append(replace(first, row=_at(row, rate), rate=rate))
    return found


def _at(row: str, rate: float) -> str:
    return f"{row} at {rate:g}"


def rate_candidates(
    settings: StudySettings, merge: Mapping[str, Any] | None = None
) -> dict[str, list[Tuned]]:
    """The tuned models with all learning rates, by row.

    Args:
        settings: of the study.
        merge: settings of the merge, for tuned merges alone; None for the other tuned models.
    """
    steps = settings.tuned_steps[0]

    def at(row: str, rates: Sequence[float], **changes: Any) -> list[Tuned]:
        return [Tuned(_at(row, rate), 0, None, steps, rate, **changes) for rate in rates]

    if merge is not None:
        return {MERGED: at(MERGED, settings.tuned_rates, merge=merge)}
    return {
        TUNED: at(TUNED, settings.tuned_rates),
        LORA: at(LORA, settings.lora_rates, rank=settings.lora_rank),
    }


def compare_candidates(
    study: Study,
    place: Place,
    name: str,
    methods: Sequence[dict[str, Any]],
    trained: Sequence[Tuned],
    drawn: Mapping[str, Sequence[SuperDiff]] | None = None,
) -> Generator[JobProgress | StageStarted, None, dict[str, Any]]:
    """Train and draw candidates, compare all on the tuning prompts, and return the report."""
    yield from train_all(study, trained, place)
    prompts = tuning_prompts(place, study.settings.num_tuning)
    captions = [caption for listed in prompts.values() for caption in listed]
    file = write_prompts(place.work / "tuning.csv", prompts)
    rivals = {
        f"{row} {n}": rival
        for row, listed in (drawn or {}).items()
        for n, rival in enumerate(listed)
    }
    folders = {row: place.work / f"{name}-drawn" / slug(row) for row in rivals}
    jobs = [
        Job(f"{place.world}: {row}", drawn_job, (rival, captions, 0, folders[row]))
        for row, rival in rivals.items()
    ]
    yield from run_jobs(jobs, study.num_processes)
    methods = [*methods, *({"name": row, "pictures": str(f)} for row, f in folders.items())]
    recipe = {
        "experts": list(place.experts.values()),
        "base": place.base,
        "prompts": {"drawbench": str(file)},
        "methods": [*methods, *({"name": each.row, **each.method(place)} for each in trained)],
        "sampling": sampling(study.settings.num_steps),
        "metrics": ["scenes"],
        "num_resamples": 100,
    }
    yield StageStarted(f"comparison of the candidates in '{place.world}'")
    evaluate_in_processes(place.work / name, recipe, study.num_processes)
    report: dict[str, Any] = read_json(place.work / name / "report.json")
    return report


def tuning_prompts(place: Place, count: int) -> dict[str, list[str]]:
    """The prompts on which rivals are chosen: of known objects, and of each expert's own."""
    listed = prompts_of(place.recipe, "tuning", count)
    groups = (groups_of(place.recipe)[0], *place.recipe.experts)
    return {group: listed[group] for group in groups if listed[group]}


def choose(report: Mapping[str, Any], grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The best candidate of each rival by the mean of all groups, the first one of equal ones.

    Args:
        report: of the comparison of all candidates.
        grids: of the rivals.

    Returns: by row, `method`, `score`, its `values` on the grid, the `edges` on which it lies, and
        the `scores` of all candidates in their order.
    """
    scores = mean_scores(report)
    rivals = {}
    for row, grid in grids.items():
        names = [f"{row} {n}" for n in range(len(grid.methods))]
        listed = [scores[name] for name in names if name in scores]
        best = listed.index(max(listed)) if listed else 0
        rivals[row] = {
            "method": grid.methods[best],
            "score": listed[best] if listed else None,
            "scores": listed,
            "values": dict(grid.points[best]),
            "edges": grid.edges(best),
        }
    return rivals


def mean_scores(report: Mapping[str, Any]) -> dict[str, float]:
    """The share of right pictures of each method, averaged over the groups of prompts."""
    return {
        row["method"]: fmean(each["scores"]["both"]["mean"] for each in row["groups"].values())
        for row in report["rows"]
    }


def _best_drawn(report: Mapping[str, Any], row: str, listed: Sequence[SuperDiff]) -> dict[str, Any]:
    """The settings of the best candidate that draws in its own way, and the edges it lies on."""
    scores = mean_scores(report)
    found = [scores[f"{row} {n}"] for n in range(len(listed))]
    best = found.index(max(found))
    points = [
        {"num_steps": each.num_steps, "logic": each.logic, "temperature": each.temperature}
        for each in listed
    ]
    edges = Grid(points, [{}] * len(points)).edges(best)
    return {"values": points[best], "score": found[best], "edges": edges, "scores": found}


def _best_rate(report: Mapping[str, Any], rates: Sequence[Tuned]) -> dict[str, Any]:
    """The best learning rate, the scores of all, and whether it is the first or the last one."""
    scores = mean_scores(report)
    best = max(rates, key=lambda each: scores[each.row])
    return {
        "rate": best.rate,
        "scores": {f"{each.rate:g}": scores[each.row] for each in rates},
        "is_edge": widened([each.rate for each in rates], best.rate) is not None,
    }


# -- lengths for the data curve ---------------------------------------------------------------


def choose_lengths(study: Study, world: str) -> Iterator[JobProgress | StageStarted]:
    """Choose how long models are tuned on few pictures, on tuning prompts.

    For the same length as with many pictures, they would see each picture so often that they only
    remember it. What is chosen already is not chosen again.

    Args:
        study: with AFA's length, as development prompts chose it.
        world: whose other settings are chosen.

    Yields:
        The progress.

    Raises:
        AfaError: if it was chosen with other settings, or a candidate fails.
    """
    if study.lengths_file.exists():
        study.lengths()
        return
    place, settings, rates = study.place(world), study.settings, chosen_rates(study)
    steps = sorted({*settings.curve_steps, settings.aggregator_steps})
    tried = {
        (row, number): [
            Tuned(counted(row, n, number), 0, number, n, rates[row], start) for n in steps
        ]
        for row, start in of_pictures(best_merge(study.chosen(world))).items()
        for number in settings.curve_pictures
    }
    listed = [each for several in tried.values() for each in several]
    report = yield from compare_candidates(study, place, "tuning-lengths", [], listed)
    scores = mean_scores(report)
    lengths: dict[str, dict[str, int]] = {}
    for (row, number), several in tried.items():
        best = max(several, key=lambda each: scores[each.row])
        lengths.setdefault(row, {})[str(number)] = best.steps
    content = {"lengths": lengths, "scores": scores, "commit": commit(), "machine": processor()}
    content["inputs"] = inputs_of_lengths(settings)
    study.chosen_in.mkdir(parents=True, exist_ok=True)
    write_atomic(study.lengths_file, json.dumps(content, indent=1) + "\n")
