"""The stages of the study, each of which can be stopped and resumed on another day."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from afa.machine.ownership import owned
from afa.studies.evaluating import StageStarted
from afa.studies.results.choosing import choose_lengths, choose_rivals
from afa.studies.results.development import develop, developed
from afa.studies.results.final import check_rows, run_test
from afa.studies.results.parts import Experiment, Stage
from afa.studies.results.run import build, train
from afa.studies.results.settings import WORLDS_OF
from afa.studies.results.study import FIRST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afa.studies.jobs import JobProgress
    from afa.studies.results.study import Study


def run_stage(
    study: Study, stage: Stage, experiment: Experiment
) -> Iterator[JobProgress | StageStarted]:
    """Run one stage of an experiment, or resume it.

    Args:
        study: the work folder and the settings. What exists there and was made with other settings
            is refused, one by one.
        stage: the stage; those before it must be finished.
        experiment: the experiment.

    Yields:
        The progress.

    Raises:
        AfaError: if a part was made with other settings, or the stage fails. Finished work is kept.
    """
    study.work.mkdir(parents=True, exist_ok=True)
    first = study.place(FIRST)
    with owned(study.work):
        if stage == Stage.DEVELOPMENT:  # in one world, for all experiments
            yield from develop(first, study.settings, study.num_processes, study.chosen_in)
            return
        is_after = stage in (Stage.TRAININGS, Stage.TEST)
        if is_after or (stage == Stage.CANDIDATES and experiment == Experiment.DATA):
            study = replace(study, settings=developed(study.chosen_in, study.settings))
        for world in WORLDS_OF[experiment]:
            yield StageStarted(f"{stage} of the world '{world}'")
            if stage == Stage.WORLDS:
                yield from build(study, world)
            elif stage == Stage.CANDIDATES:
                yield from choose_rivals(study, world)
                if experiment == Experiment.DATA:
                    yield from choose_lengths(study, world)
            elif stage == Stage.TRAININGS:
                check_rows(study, experiment, world)
                yield from train(study, experiment, world)
            else:
                yield from run_test(study, experiment, world)
