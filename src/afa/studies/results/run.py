"""The worlds of the study, and the trainings of everything that enters its tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.files import write_atomic
from afa.studies.results.entrants import TRAINING_PROMPTS, Distilled
from afa.studies.results.kept import read_rows
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import AFA, CEILINGS, DISTILLED, drawn_with_afa
from afa.studies.results.study import entrants_of, train_all
from afa.studies.worlds.build import build_world
from afa.studies.worlds.prompts import training_prompts
from afa.studies.worlds.recipe import read_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afa.studies.jobs import JobProgress
    from afa.studies.results.entrants import Entrant
    from afa.studies.results.study import Study


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


def train(study: Study, experiment: Experiment, world: str) -> Iterator[JobProgress]:
    """Train what enters the test of an experiment in a world, and has no outcomes there yet."""
    place = study.place(world)
    entrants = pending(study, experiment, world)
    prompts = training_prompts(place.recipe, study.settings.distilled_pictures)
    place.work.mkdir(parents=True, exist_ok=True)
    write_atomic(place.work / TRAINING_PROMPTS, "\n".join(prompts) + "\n")
    students = [each for each in entrants if isinstance(each, Distilled)]
    yield from train_all(study, [each for each in entrants if each not in students], place)
    # the complete students first, which record what guided ones share
    for bakes_in in (False, True):
        yield from train_all(study, [each for each in students if each.bakes_in == bakes_in], place)


def pending(study: Study, experiment: Experiment, world: str) -> list[Entrant]:
    """The trainings of an experiment in a world that rows without outcomes need."""
    entrants = entrants_of(study, experiment, world)
    known = read_rows(study.outcomes, experiment, world)
    wanted = {each.row for each in entrants if each.row not in known}
    wanted = wanted.intersection(study.rows) if study.rows else wanted
    others = drawn_with_afa(study.settings) if experiment == Experiment.MAIN else []
    others = [row for row in others if row not in known and row in (study.rows or others)]
    if any(row.startswith(DISTILLED) for row in wanted) or others:
        wanted.add(AFA)  # with whose ensembles they draw, or from which they learn
    return [each for each in entrants if each.row in wanted]
