"""The study as its stages share it: work folder, settings, and what was chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json
from afa.studies.jobs import run_jobs
from afa.studies.results.entrants import Place
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import trained

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from afa.studies.jobs import JobProgress
    from afa.studies.results.entrants import Entrant
    from afa.studies.results.settings import StudySettings

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
    settings: StudySettings
    num_processes: int
    docs: Path
    rows: tuple[str, ...] = ()

    @property
    def outcomes(self) -> Path:
        """The folder of everything that the documentation keeps."""
        return self.docs / "results"

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
        content = read_json(path)
        _require_inputs(path, content["inputs"], inputs_of_choice(self.settings))
        return {key: value for key, value in content.items() if key != "inputs"}

    @property
    def lengths_file(self) -> Path:
        """The file of the lengths of the data curve, as the stage of candidates chose them."""
        return self.chosen_in / f"{Experiment.DATA}.json"

    def lengths(self) -> dict[str, dict[str, int]]:
        """The lengths of the tuned models of the data curve, by row and number of pictures.

        Raises:
            AfaError: if they are not chosen yet, or were chosen with other settings.
        """
        if not self.lengths_file.exists():
            raise AfaError(
                "AFA-STUDY-035",
                "The lengths of the tuned models of the data curve are not chosen yet. Run the "
                f"stage candidates of the experiment {Experiment.DATA} first.",
            )
        content = read_json(self.lengths_file)
        _require_inputs(self.lengths_file, content["inputs"], inputs_of_lengths(self.settings))
        found: dict[str, dict[str, int]] = content["lengths"]
        return found


def _require_inputs(path: Path, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    if found != inputs:
        raise AfaError(
            "AFA-STUDY-029",
            f"'{path}' was chosen with other settings of the study. Remove it, and run the stage "
            "candidates again.",
        )


def inputs_of_lengths(settings: StudySettings) -> dict[str, Any]:
    """The settings of the study that decide which lengths the data curve has."""
    keys = ("curve_pictures", "curve_steps", "aggregator_steps")
    inputs = {**inputs_of_choice(settings), **{key: getattr(settings, key) for key in keys}}
    found: dict[str, Any] = json.loads(json.dumps(inputs))
    return found


def inputs_of_choice(settings: StudySettings) -> dict[str, Any]:
    """The settings of the study that decide what the stage of candidates chooses."""
    of_trainings = ("tuned_rates", "lora_rank", "lora_rates", "num_pictures", "batch_size")
    keys = (*of_trainings, "num_tuning", "num_steps")
    inputs = {"steps": settings.tuned_steps[0], **{key: getattr(settings, key) for key in keys}}
    found: dict[str, Any] = json.loads(json.dumps(inputs))
    return found


def chosen_rates(study: Study) -> dict[str, float]:
    """The learning rates of tuned models, by row."""
    return {row: each["rate"] for row, each in study.chosen(FIRST)["rates"].items()}


def best_merge(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the best merge of a world."""
    rivals = [each for each in chosen["rivals"].values() if "merge" in each["method"]]
    best = max(rivals, key=lambda each: each["score"])
    found: dict[str, Any] = best["method"]["merge"]
    return found


def train_all(study: Study, entrants: Sequence[Entrant], place: Place) -> Iterator[JobProgress]:
    """Run the jobs of entrants; those that an earlier experiment finished return at once."""
    jobs = [each.job(place, study.settings) for each in entrants]
    yield from run_jobs(jobs, study.num_processes)


def entrants_of(study: Study, experiment: Experiment, world: str) -> list[Entrant]:
    """The trainings of an experiment in a world, with all settings that were chosen."""
    rates, merge = chosen_rates(study), best_merge(study.chosen(world))
    lengths = study.lengths() if experiment == Experiment.DATA else None
    return trained(experiment, study.settings, rates, merge, lengths)
