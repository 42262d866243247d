"""The last stage: all rows draw the test prompts, which nothing else reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.evaluation.recipe import slug
from afa.studies.evaluating import StageStarted, evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs
from afa.studies.results.comparison import PROMPTS, REFERENCES, test_comparison, write_prompts
from afa.studies.results.development import read_developed
from afa.studies.results.drawn import drawn_job, pairs_of, scenes_job
from afa.studies.results.entrants import Aggregated, scenes_of
from afa.studies.results.outcomes import (
    describe,
    require_rows,
    require_same_ensembles,
    wanted_rows,
    write_outcomes,
)
from afa.studies.results.parts import Experiment
from afa.studies.results.rivals.oracle_mask import OracleMask
from afa.studies.results.rivals.other_steps import OtherSteps
from afa.studies.results.rivals.prompt_router import PromptRouter
from afa.studies.results.rivals.real_scenes import RealScenes
from afa.studies.results.rivals.superdiff import SuperDiff
from afa.studies.results.rows import (
    AFA,
    CEILINGS,
    SPARSE,
    at_steps,
    by_step,
)
from afa.studies.results.settings import WITH_ALL_RIVALS
from afa.studies.results.study import FIRST, entrants_of
from afa.studies.trainings import open_scenes
from afa.studies.worlds.prompts import groups_of, prompts_of
from afa.studies.worlds.recipe import POOLED, WIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from afa.studies.jobs import JobProgress
    from afa.studies.results.entrants import Entrant, Place
    from afa.studies.results.rivals.rival import Rival
    from afa.studies.results.settings import StudySettings
    from afa.studies.results.study import Study


def run_test(
    study: Study, experiment: Experiment, world: str
) -> Iterator[JobProgress | StageStarted]:
    """Draw the test prompts of a world with the rows of an experiment, and write the outcomes.

    Rows that have outcomes already are kept.

    Args:
        study: whose other stages are finished.
        experiment: the experiment.
        world: one of its worlds.

    Yields:
        The progress.

    Raises:
        AfaError: if an earlier stage is not finished, a picture cannot be drawn, the outcomes are
            of another test, or one of `study.rows` is unknown.
    """
    place, settings = study.place(world), study.settings
    chosen = chosen_in(study, world)
    entrants = entrants_of(study, experiment, world)
    prompts = test_prompts(place, experiment, settings)
    captions = [caption for listed in prompts.values() for caption in listed]
    sampled = {**sampling(settings.num_steps), "seeds": [settings.test_seed]}
    found = read_developed(study.chosen_in, settings)
    developed = {key: found[key] for key in ("rows", "shares", "inputs")}
    every = {**chosen, "developed": developed}
    if experiment == Experiment.DATA:
        every["lengths"] = study.lengths()
    test = describe(study, experiment, place, prompts, sampled, every)

    work = place.work / f"test-{experiment}"
    rivals = _rivals(study, experiment, place, chosen)
    methods = methods_of(experiment, place, entrants, chosen)
    methods += [
        {"name": row, "pictures": [str(work / "drawn" / folder) for folder in listed]}
        for row, listed in rivals.items()
    ]
    names = [method["name"] for method in methods]
    wanted = wanted_rows(study, test, names)
    if not wanted:
        return
    require_same_ensembles(study, test, place, entrants, wanted)
    jobs = [
        Job(
            f"{world}: {folder}",
            drawn_job,
            (rival, captions, settings.test_seed, work / "drawn" / folder),
        )
        for row, listed in rivals.items()
        for folder, rival in listed.items()
        if row in wanted
    ]
    # of the first group, whose pictures they are compared with
    mixed = pairs_of(prompts[groups_of(place.recipe)[0]])
    references = (mixed, settings.num_references, work / REFERENCES)
    jobs.append(Job("real scenes", scenes_job, references))
    yield from run_jobs(jobs, study.num_processes)

    yield StageStarted(f"test of the world '{world}'")
    write_prompts(work / PROMPTS, prompts)
    recipe = {
        "experts": list(place.experts.values()),
        "base": place.base,
        "methods": [method for method in methods if method["name"] in wanted],
        **test_comparison(work, sampled),
    }
    evaluate_in_processes(work / "comparison", recipe, study.num_processes)
    write_outcomes(study, place, test, recipe, work / "comparison", entrants, names)


def check_rows(study: Study, experiment: Experiment, world: str) -> None:
    """Check that an experiment has the rows of `study.rows`, before anything is trained.

    Raises:
        AfaError: if it lacks one, or the rivals' settings are not chosen yet.
    """
    place, chosen = study.place(world), chosen_in(study, world)
    entrants = entrants_of(study, experiment, world)
    names = [method["name"] for method in methods_of(experiment, place, entrants, chosen)]
    require_rows(study, [*names, *_rivals(study, experiment, place, chosen)])


def _rivals(
    study: Study, experiment: Experiment, place: Place, chosen: Mapping[str, Any]
) -> dict[str, dict[str, Rival]]:
    """The rivals that draw in their own way by row, and by folder for each training."""
    if experiment not in WITH_ALL_RIVALS:
        return _bounds(study, place)
    rivals = drawn_rivals(study, place, chosen)
    return rivals | (_other_steps(study, place) if experiment == Experiment.MAIN else {})


def chosen_in(study: Study, world: str) -> dict[str, Any]:
    """All settings that tuning prompts chose: of a world's merges, and of the rest in the first."""
    first, own = study.chosen(FIRST), study.chosen(world)
    kept = {row: each for row, each in first["rivals"].items() if "merge" not in each["method"]}
    found = {**first, "rivals": {**own["rivals"], **kept}}
    return {key: found[key] for key in ("rivals", "drawn", "rates")}


def test_prompts(
    place: Place, experiment: Experiment, settings: StudySettings
) -> dict[str, list[str]]:
    """The test prompts of a world, by group."""
    is_main = experiment == Experiment.MAIN
    num_mixed = settings.num_mixed if is_main else settings.num_mixed_elsewhere
    listed = prompts_of(place.recipe, "test", max(settings.num_mixed, settings.num_own))
    return {
        group: captions[: settings.num_own if group in place.recipe.experts else num_mixed]
        for group, captions in listed.items()
    }


def _bounds(study: Study, place: Place) -> dict[str, dict[str, Rival]]:
    steps = study.settings.num_steps
    return {
        RealScenes.row: {"real": RealScenes(place, steps)},
        OracleMask.row: {"oracle": OracleMask(place, steps)},
    }


def drawn_rivals(
    study: Study, place: Place, chosen: Mapping[str, Any]
) -> dict[str, dict[str, Rival]]:
    """The rivals that draw in their own way, by row: their folders and settings."""
    steps = study.settings.num_steps
    data = open_scenes(scenes_of(place, 0, study.settings.num_pictures))
    return {
        **_bounds(study, place),
        PromptRouter.row: {"router": PromptRouter(place, steps, data)},
        **{
            row: {slug(row): SuperDiff(place, **each["values"])}
            for row, each in chosen["drawn"].items()
        },
    }


def _other_steps(study: Study, place: Place) -> dict[str, dict[str, Rival]]:
    ensembles = [Aggregated(AFA, seed).folder(place) for seed in range(study.settings.num_seeds)]
    return {
        at_steps(n): {
            f"{slug(at_steps(n))}-{seed}": OtherSteps(place, n, ensemble)
            for seed, ensemble in enumerate(ensembles)
        }
        for n in study.settings.other_steps
    }


def methods_of(
    experiment: Experiment,
    place: Place,
    entrants: Sequence[Entrant],
    chosen: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """All rows except those that draw in their own way, as methods of `afa evaluate`."""
    rows: dict[str, dict[str, Any]] = {}
    for each in entrants:
        method = each.method(place)
        for kind, value in method.items():
            if kind == "guidance":
                rows[each.row][kind] = value
            else:
                rows.setdefault(each.row, {}).setdefault(kind, []).append(value)
    methods: list[dict[str, Any]] = [{"name": row, **method} for row, method in rows.items()]
    methods.append({"name": "base", "model": place.base})
    kinds = ["merge"]
    if experiment in WITH_ALL_RIVALS:
        models = {f"expert: {name}": source for name, source in place.experts.items()}
        trained_too = {POOLED: place.recipe.pooled_steps, WIDE: place.recipe.is_wide}
        others = {row: name for name, row in CEILINGS.items() if trained_too[name]}
        models |= {row: str(place.models / name) for row, name in others.items()}
        methods += [{"name": row, "model": source} for row, source in models.items()]
        drafts = {"judge": place.base}
        methods.append({"name": "drafts", "fusion": {"rule": "feature_mean"}, "drafts": drafts})
        kinds.append("fusion")
    if experiment == Experiment.MAIN:
        methods += _sparse(rows[AFA]["ensemble"])
    methods += [
        {"name": row, **rival["method"]}
        for row, rival in chosen["rivals"].items()
        if any(kind in rival["method"] for kind in kinds)
        and rival["method"].get("fusion", {}).get("rule") != "shell"
    ]
    return methods


def _sparse(ensemble: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Sparse routing: by pixel, and by step, where the other experts do not run."""
    for count, name in enumerate(SPARSE, start=1):
        yield {"name": name, "ensemble": ensemble, "sparse": {"experts": count}}
        skipping = {"experts": count, "by": "step", "every": 5}
        yield {"name": by_step(name), "ensemble": ensemble, "sparse": skipping}
