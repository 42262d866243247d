"""The last stage: all rows draw the test prompts, which nothing else reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.evaluation.recipe import slug
from afa.studies.evidence.comparison import REFERENCES, test_comparison
from afa.studies.evidence.drawn import drawn_job, pairs_of, scenes_job
from afa.studies.evidence.entrants import Aggregated, scenes_of
from afa.studies.evidence.jobs import open_scenes
from afa.studies.evidence.outcomes import write_outcomes
from afa.studies.evidence.parts import Experiment
from afa.studies.evidence.rivals.oracle_mask import OracleMask
from afa.studies.evidence.rivals.other_steps import OtherSteps
from afa.studies.evidence.rivals.prompt_router import PromptRouter
from afa.studies.evidence.rivals.real_scenes import RealScenes
from afa.studies.evidence.rivals.superdiff import SuperDiff
from afa.studies.evidence.rows import AFA, POOLED_ROW, WIDE_ROW, at_steps, trained
from afa.studies.evidence.run import best_merge, chosen_rates
from afa.studies.results.jobs import Job, run_jobs
from afa.studies.results.run import StageStarted, evaluate_in_processes
from afa.studies.worlds.prompts import groups_of, prompts_of
from afa.studies.worlds.recipe import POOLED, WIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.studies.evidence.entrants import Entrant, Place
    from afa.studies.evidence.rivals.rival import Rival
    from afa.studies.evidence.run import Study
    from afa.studies.results.jobs import JobProgress

#: experiments with rows of single experts and of drafts; only the first one has all rivals
_WITH_EXPERTS = (Experiment.MAIN, Experiment.PRIVATE)


def run_test(
    study: Study, experiment: Experiment, world: str, docs: Path
) -> Iterator[JobProgress | StageStarted]:
    """Draw the test prompts of a world with all rows of an experiment, and write the outcomes.

    Args:
        study: whose other stages are finished.
        experiment: the experiment.
        world: one of its worlds.
        docs: gets the outcomes of every picture.

    Yields:
        The progress.

    Raises:
        AfaError: if an earlier stage is not finished, or a picture cannot be drawn.
    """
    place, settings = study.place(world), study.settings
    chosen = study.chosen(world)
    entrants = trained(experiment, settings, chosen_rates(study), best_merge(chosen))
    prompts = test_prompts(place, settings.num_mixed, settings.num_own)
    captions = [caption for listed in prompts.values() for caption in listed]
    work = place.work / f"test-{experiment}"
    bounds = _bounds(study, place)
    rivals = drawn_rivals(study, place, chosen) if experiment == Experiment.MAIN else bounds
    jobs = [
        Job(
            f"{world}: {row}",
            drawn_job,
            (rival, captions, settings.test_seed, work / "drawn" / folder),
        )
        for row, (folder, rival) in rivals.items()
    ]
    mixed = pairs_of([caption for group in _mixed(place) for caption in prompts[group]])
    references = (mixed, settings.num_references, work / REFERENCES)
    jobs.append(Job("real scenes", scenes_job, references))
    yield from run_jobs(jobs, study.num_processes)

    yield StageStarted(f"test of the world '{world}'")
    methods = methods_of(experiment, place, entrants, chosen)
    methods += [
        {"name": row, "pictures": str(work / "drawn" / folder)}
        for row, (folder, _) in rivals.items()
    ]
    recipe = {
        "experts": list(place.experts.values()),
        "base": place.base,
        "methods": methods,
        **test_comparison(work, prompts, settings),
    }
    evaluate_in_processes(work / "comparison", recipe, study.num_processes)
    write_outcomes(docs, study, experiment, place, recipe, work / "comparison", entrants, chosen)


def test_prompts(place: Place, num_mixed: int, num_own: int) -> dict[str, list[str]]:
    """The test prompts of a world, by group."""
    listed = prompts_of(place.recipe, "test", max(num_mixed, num_own))
    return {
        group: captions[: num_own if group in place.recipe.experts else num_mixed]
        for group, captions in listed.items()
    }


def _mixed(place: Place) -> list[str]:
    return [group for group in groups_of(place.recipe) if group not in place.recipe.experts]


def _bounds(study: Study, place: Place) -> dict[str, tuple[str, Rival]]:
    steps = study.settings.num_steps
    return {
        RealScenes.row: ("real", RealScenes(place, steps)),
        OracleMask.row: ("oracle", OracleMask(place, steps)),
    }


def drawn_rivals(
    study: Study, place: Place, chosen: Mapping[str, Any]
) -> dict[str, tuple[str, Rival]]:
    """The rivals that draw in their own way, by row: their folders and settings."""
    steps = study.settings.num_steps
    data = open_scenes(scenes_of(place, 0, study.settings.num_pictures))
    ensemble = Aggregated(AFA, 0).folder(place)
    return {
        **_bounds(study, place),
        PromptRouter.row: ("router", PromptRouter(place, steps, data)),
        **{
            at_steps(n): (slug(at_steps(n)), OtherSteps(place, n, ensemble))
            for n in study.settings.other_steps
        },
        **{
            row: (slug(row), SuperDiff(place, **each["values"]))
            for row, each in chosen["drawn"].items()
        },
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
    if experiment in _WITH_EXPERTS:
        methods += [
            {"name": f"expert: {name}", "model": source} for name, source in place.experts.items()
        ]
        drafts = {"judge": place.base}
        methods.append({"name": "drafts", "fusion": {"rule": "feature_mean"}, "drafts": drafts})
    kinds = ["merge"]
    if experiment == Experiment.MAIN:
        others = {POOLED_ROW: POOLED, WIDE_ROW: WIDE}
        methods += [
            {"name": row, "model": str(place.models / folder)}
            for row, folder in others.items()
            if (place.models / folder).exists()
        ]
        methods += _sparse(rows[AFA]["ensemble"])
        kinds.append("fusion")
    methods += [
        {"name": row, **rival["method"]}
        for row, rival in chosen["rivals"].items()
        if any(kind in rival["method"] for kind in kinds)
        and rival["method"].get("fusion", {}).get("rule") != "shell"
    ]
    return methods


def _sparse(ensemble: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Sparse routing: by pixel, and by step, where the other experts do not run."""
    for count in (1, 2):
        yield {"name": f"top-{count}", "ensemble": ensemble, "sparse": {"experts": count}}
        by_step = {"experts": count, "by": "step", "every": 5}
        yield {"name": f"top-{count}, by step", "ensemble": ensemble[:1], "sparse": by_step}
