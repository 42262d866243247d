"""The stages before the test: worlds, settings of the rivals, trainings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.evaluation.recipe import slug
from afa.files import read_json, write_atomic
from afa.provenance import commit, processor
from afa.studies.evidence.candidates import Grid, fusions, merges
from afa.studies.evidence.comparison import write_prompts
from afa.studies.evidence.development import MOST_WIDENINGS, widened
from afa.studies.evidence.drawn import drawn_job
from afa.studies.evidence.entrants import TRAINING_PROMPTS, Distilled, Place, Tuned
from afa.studies.evidence.kept import read_rows
from afa.studies.evidence.parts import Experiment
from afa.studies.evidence.rivals.superdiff import candidates
from afa.studies.evidence.rows import (
    AFA,
    CEILINGS,
    DISTILLED,
    LORA,
    MERGED,
    TUNED,
    drawn_with_afa,
    trained,
)
from afa.studies.results.jobs import Job, JobProgress, run_jobs
from afa.studies.results.plan import sampling
from afa.studies.results.run import StageStarted, evaluate_in_processes
from afa.studies.worlds.build import build_world
from afa.studies.worlds.prompts import groups_of, prompts_of, training_prompts
from afa.studies.worlds.recipe import read_world

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from afa.studies.evidence.entrants import Entrant
    from afa.studies.evidence.rivals.superdiff import SuperDiff
    from afa.studies.evidence.settings import EvidenceSettings

#: the world in which AFA's settings and the learning rates are chosen, for all worlds
FIRST = "main"


@dataclass(frozen=True)
class Study:
    """A work folder and its settings.

    Attributes:
        work: the folder.
        settings: of the study.
        num_processes: number of processes with one thread each.
        docs: folder of the documentation, which keeps the outcomes of all stages.
        rows: the rows to train and to test; none for all that have no outcomes yet.
    """

    work: Path
    settings: EvidenceSettings
    num_processes: int
    docs: Path
    rows: tuple[str, ...] = ()

    @property
    def outcomes(self) -> Path:
        """The folder of everything that the documentation keeps."""
        return self.docs / "evidence"

    @property
    def chosen_in(self) -> Path:
        """The folder of all settings that were chosen."""
        return self.outcomes / "settings"

    def place(self, world: str) -> Place:
        """The place of a world."""
        return Place(world, self.work / "worlds" / world, self.work / "trained" / world)

    def chosen(self, world: str) -> dict[str, Any]:
        """The settings of rivals in a world, as the stage of candidates chose them.

        Raises:
            AfaError: if they are not chosen yet.
        """
        path = self.chosen_in / f"{world}.json"
        if not path.exists():
            raise AfaError(
                "AFA-STUDY-016",
                f"The settings of the rivals in the world '{world}' are not chosen yet. Run the "
                "stage candidates first.",
            )
        found: dict[str, Any] = read_json(path)
        if found.pop("inputs") != _inputs(self.settings):
            raise AfaError(
                "AFA-STUDY-029",
                f"'{path}' was chosen with other settings of the study. Remove it, and run the "
                "stage candidates again.",
            )
        return found


def _inputs(settings: EvidenceSettings) -> dict[str, Any]:
    """The settings of the study that decide what the stage of candidates chooses."""
    of_trainings = ("tuned_rates", "lora_rank", "lora_rates", "num_pictures", "batch_size")
    keys = (*of_trainings, "num_tuning", "num_steps")
    inputs = {"steps": settings.tuned_steps[0], **{key: getattr(settings, key) for key in keys}}
    found: dict[str, Any] = json.loads(json.dumps(inputs))
    return found


def build(study: Study, world: str) -> Iterator[JobProgress]:
    """Build a world, and first the one from which it starts."""
    folder = study.place(world).models
    recipe = read_world(world, folder)
    if recipe.start is not None and not (recipe.start / "base").exists():
        yield from build(study, recipe.start.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    packed = study.outcomes / "worlds" / world
    found = packed if packed.is_dir() else None
    tested = {row for each in Experiment for row in read_rows(study.outcomes, each, world)}
    without = [name for name, row in CEILINGS.items() if row in tested]
    yield from build_world(folder, recipe, study.num_processes, found, without)


# -- settings of the rivals -------------------------------------------------------------------


def choose_rivals(study: Study, world: str) -> Iterator[JobProgress | StageStarted]:
    """Choose the settings of the rivals on the tuning prompts of a world.

    Only merges, if it is not the first world. In that one, the learning rates of all tuned models
    are chosen, too, at their shortest length; then that of the tuned merge, which starts from the
    best one. What is chosen already is not chosen again.
    """
    if (study.chosen_in / f"{world}.json").exists():
        study.chosen(world)
        return
    place, settings = study.place(world), study.settings
    grids, is_first = merges(len(place.experts)), world == FIRST
    drawn: dict[str, list[SuperDiff]] = {}
    if is_first:
        grids |= fusions(list(place.experts))
        drawn = candidates(place)
    methods = [
        {"name": f"{row} {n}", **method}
        for row, grid in grids.items()
        for n, method in enumerate(grid.methods)
        if len(grid.methods) > 1
    ]
    report = yield from _tuning(study, place, "tuning", methods, [], drawn)
    chosen = choose(report, grids)
    chosen["drawn"] = {row: _best_drawn(report, row, each) for row, each in drawn.items()}
    if is_first:
        rates = yield from _choose_rates(study, place, "tuning-rates", rate_candidates(settings))
        merged = rate_candidates(settings, best_merge(chosen))
        of_merged = yield from _choose_rates(study, place, "tuning-merged", merged)
        chosen["rates"] = {**rates, **of_merged}
    chosen |= {"commit": commit(), "machine": processor(), "inputs": _inputs(settings)}
    study.chosen_in.mkdir(parents=True, exist_ok=True)
    write_atomic(study.chosen_in / f"{world}.json", json.dumps(chosen, indent=1) + "\n")


def _choose_rates(
    study: Study, place: Place, name: str, tried: dict[str, list[Tuned]]
) -> Generator[JobProgress | StageStarted, None, dict[str, Any]]:
    """Choose learning rates, and try one more beyond the best one while it is at an end.

    Returns: by row, the best rate, the scores of all, and whether it is still the first or last.
    """
    for extension in range(MOST_WIDENINGS + 1):
        listed = [each for several in tried.values() for each in several]
        report = yield from _tuning(study, place, name, [], listed)
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
    settings: EvidenceSettings, merge: Mapping[str, Any] | None = None
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


def _tuning(
    study: Study,
    place: Place,
    name: str,
    methods: Sequence[dict[str, Any]],
    trained: Sequence[Tuned],
    drawn: Mapping[str, Sequence[SuperDiff]] | None = None,
) -> Generator[JobProgress | StageStarted, None, dict[str, Any]]:
    """Train and draw candidates, compare all on the tuning prompts, and return the report."""
    yield from _jobs(study, trained, place)
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
    scores = _scores(report)
    rivals = {}
    for row, grid in grids.items():
        count = len(grid.methods)
        listed = [scores[f"{row} {n}"] for n in range(count)] if count > 1 else [0.0]
        best = listed.index(max(listed))
        rivals[row] = {
            "method": grid.methods[best],
            "score": listed[best] if len(listed) > 1 else None,
            "scores": listed if len(listed) > 1 else [],
            "values": dict(grid.points[best]),
            "edges": grid.edges(best),
        }
    return {"rivals": rivals}


def _scores(report: Mapping[str, Any]) -> dict[str, float]:
    """The share of right pictures of each method, averaged over the groups of prompts."""
    return {
        row["method"]: fmean(each["scores"]["both"]["mean"] for each in row["groups"].values())
        for row in report["rows"]
    }


def _best_drawn(report: Mapping[str, Any], row: str, listed: Sequence[SuperDiff]) -> dict[str, Any]:
    """The settings of the best candidate that draws in its own way, and the edges it lies on."""
    scores = _scores(report)
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
    scores = _scores(report)
    best = max(rates, key=lambda each: scores[each.row])
    return {
        "rate": best.rate,
        "scores": {f"{each.rate:g}": scores[each.row] for each in rates},
        "is_edge": widened([each.rate for each in rates], best.rate) is not None,
    }


# -- trainings --------------------------------------------------------------------------------


def train(study: Study, experiment: Experiment, world: str) -> Iterator[JobProgress]:
    """Train what enters the test of an experiment in a world, and has no outcomes there yet."""
    place = study.place(world)
    entrants = pending(study, experiment, world)
    prompts = training_prompts(place.recipe, study.settings.distilled_pictures)
    place.work.mkdir(parents=True, exist_ok=True)
    write_atomic(place.work / TRAINING_PROMPTS, "\n".join(prompts) + "\n")
    students = [each for each in entrants if isinstance(each, Distilled)]
    yield from _jobs(study, [each for each in entrants if each not in students], place)
    # the complete students first, which record what guided ones share
    for bakes_in in (False, True):
        yield from _jobs(study, [each for each in students if each.bakes_in == bakes_in], place)


def pending(study: Study, experiment: Experiment, world: str) -> list[Entrant]:
    """The trainings of an experiment in a world that rows without outcomes need."""
    merge = best_merge(study.chosen(world))
    entrants = trained(experiment, study.settings, chosen_rates(study), merge)
    known = read_rows(study.outcomes, experiment, world)
    wanted = {each.row for each in entrants if each.row not in known}
    wanted = wanted.intersection(study.rows) if study.rows else wanted
    others = drawn_with_afa(study.settings) if experiment == Experiment.MAIN else []
    others = [row for row in others if row not in known and row in (study.rows or others)]
    if any(row.startswith(DISTILLED) for row in wanted) or others:
        wanted.add(AFA)  # with whose ensembles they draw, or from which they learn
    return [each for each in entrants if each.row in wanted]


def chosen_rates(study: Study) -> dict[str, float]:
    """The learning rates of tuned models, by row."""
    return {row: each["rate"] for row, each in study.chosen(FIRST)["rates"].items()}


def best_merge(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the best merge of a world."""
    rivals = [each for each in chosen["rivals"].values() if "merge" in each["method"]]
    best = max(rivals, key=lambda each: each["score"])
    found: dict[str, Any] = best["method"]["merge"]
    return found


def _jobs(study: Study, entrants: Sequence[Entrant], place: Place) -> Iterator[JobProgress]:
    """Run the jobs of entrants; those that an earlier experiment finished return at once."""
    jobs = [each.job(place, study.settings) for each in entrants]
    yield from run_jobs(jobs, study.num_processes)
