"""What enters a comparison: how each row is made, and what it costs in all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from afa.aggregators import SABWSettings
from afa.distilling.recipe import DistillRecipe
from afa.drafting import DraftsRecipe
from afa.evaluation.recipe import slug
from afa.evaluation.work import digest
from afa.loading.expert_source import ExpertSource
from afa.merging.recipe import WITH_BASE
from afa.studies.distillation.run import distill_job
from afa.studies.jobs import Job, train_aggregators_job
from afa.studies.results.jobs import lora_job, merged_job
from afa.studies.trainings import tuned_job
from afa.studies.worlds.recipe import BASE, WORLDS
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE
from afa.training.recipe import (
    DataRecipe,
    PromptedPictures,
    Recipe,
    ScenesRecipe,
    TrainingRecipe,
)
from afa.zoo.models import AGGREGATOR

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.studies.results.settings import StudySettings
    from afa.studies.worlds.recipe import WorldRecipe

#: file of the prompts that teachers draw
TRAINING_PROMPTS = "training-prompts.txt"
#: the first seed of the scenes; those of worlds are smaller
_DATA_SEED = 100


@dataclass(frozen=True)
class Place:
    """Where a world is, and where what is trained in it goes.

    Attributes:
        world: its name.
        models: folder of its base and experts.
        work: folder of the trainings in it.
    """

    world: str
    models: Path
    work: Path

    @property
    def recipe(self) -> WorldRecipe:
        """The description of the world."""
        return WORLDS[self.world]

    @property
    def experts(self) -> dict[str, str]:
        """The sources of its experts, by name."""
        return {name: str(self.models / name) for name in self.recipe.experts}

    @property
    def base(self) -> str:
        """The source of its base."""
        return str(self.models / BASE)


def scenes_of(place: Place, seed: int, number: int) -> ScenesRecipe:
    """The data of everything that is trained in a world: what its base knows, no test pair."""
    return ScenesRecipe(
        num_samples=number,
        seed=_DATA_SEED + seed,
        without=sorted(place.recipe.private_objects),
        hold_out="fifth",
    )


@dataclass(frozen=True)
class Entrant(ABC):
    """One training of a row.

    Attributes:
        row: its name on the page.
        seed: of the training and its data.
        number: different scenes in its data; None for all of the settings.
    """

    row: str
    seed: int = 0
    number: int | None = None

    def folder(self, place: Place) -> Path:
        """The folder of its result."""
        return place.work / "trained" / f"{slug(self.row)}-{self.seed}"

    @abstractmethod
    def job(self, place: Place, settings: StudySettings) -> Job:
        """The job that trains it, or resumes."""

    @abstractmethod
    def samples(self, settings: StudySettings) -> int:
        """The pictures that this training sees, without those of experts and base."""

    def method(self, place: Place) -> dict[str, Any]:
        """How a recipe of `afa evaluate` names the result."""
        return {"model": str(self.folder(place))}

    def training(self, settings: StudySettings, num_steps: int, rate: float) -> TrainingRecipe:
        """The settings of a training on a cosine schedule."""
        return TrainingRecipe(
            num_steps=num_steps,
            batch_size=settings.batch_size,
            learning_rate=rate,
            num_warmup_steps=min(50, num_steps),
            learning_rate_schedule="cosine",
            checkpoint_every=100,
            keep_checkpoints=1,
            trackers=[],
            device="cpu",
            seed=self.seed,
        )

    def data(self, place: Place, settings: StudySettings) -> ScenesRecipe:
        """Its data."""
        return scenes_of(place, self.seed, self.number or settings.num_pictures)


@dataclass(frozen=True)
class Aggregated(Entrant):
    """Aggregators on a world's experts.

    Attributes:
        changes: settings of the aggregators that differ from the zoo's.
        steps: optimizer steps; None for those of the settings.
        rate: learning rate; None for that of the settings.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    rate: float | None = None

    def job(self, place: Place, settings: StudySettings) -> Job:
        """See `Entrant.job`."""
        rate = settings.aggregator_rate if self.rate is None else self.rate
        chosen = {each.name: getattr(AGGREGATOR, each.name) for each in fields(SABWSettings)}
        recipe = Recipe(
            experts=[ExpertSource(source) for source in place.experts.values()],
            data=self.source(place, settings),
            aggregator=replace(SABWSettings(**chosen), **self.changes),
            training=self.training(settings, self._steps(settings), rate),
        )
        folder = self.folder(place)
        return Job(f"{place.world}: {folder.name}", train_aggregators_job, (recipe, folder))

    def source(self, place: Place, settings: StudySettings) -> DataRecipe:
        """Where its pictures come from."""
        return DataRecipe(scenes=self.data(place, settings))

    def samples(self, settings: StudySettings) -> int:
        """See `Entrant.samples`."""
        return self._steps(settings) * settings.batch_size

    def method(self, place: Place) -> dict[str, Any]:
        """See `Entrant.method`."""
        return {"ensemble": str(self.folder(place))}

    def _steps(self, settings: StudySettings) -> int:
        return self.steps or settings.aggregator_steps


@dataclass(frozen=True)
class Drafted(Aggregated):
    """Aggregators on pictures that the experts draw themselves by drafts, from prompts alone."""

    def source(self, place: Place, settings: StudySettings) -> DataRecipe:
        """See `Aggregated.source`."""
        prompts = PromptedPictures(
            file=place.work / TRAINING_PROMPTS,
            drafts=DraftsRecipe(judge=ExpertSource(place.base)),
            number=settings.distilled_pictures,
            num_steps=settings.num_steps,
            guidance=GUIDANCE_SCALE,
            batch_size=20,
            seed=self.seed,
        )
        return DataRecipe(prompts=prompts)


@dataclass(frozen=True)
class Tuned(Entrant):
    """A single model, fine-tuned on the data of the aggregators.

    Attributes:
        steps: optimizer steps.
        rate: learning rate.
        merge: settings of the merge where it starts; None starts from the base.
        rank: of a LoRA on the base, which alone is trained; None trains all weights.
    """

    steps: int = 1_000
    rate: float = 3e-4
    merge: Mapping[str, Any] | None = None
    rank: int | None = None

    def folder(self, place: Place) -> Path:
        """See `Entrant.folder`; another merge has another folder."""
        folder = super().folder(place)
        if self.merge is None:
            return folder
        return folder.with_name(f"{folder.name}-{digest(dict(self.merge))}")

    def job(self, place: Place, settings: StudySettings) -> Job:
        """See `Entrant.job`."""
        folder = self.folder(place)
        training = self.training(settings, self.steps, self.rate)
        data, name = self.data(place, settings), f"{place.world}: {folder.name}"
        if self.rank is not None:
            return Job(name, lora_job, (place.base, data, training, self.rank, folder))
        if self.merge is None:
            return Job(name, tuned_job, (place.base, data, training, folder))
        needs_base = self.merge["method"] in WITH_BASE
        merge = {"experts": list(place.experts.values()), **self.merge}
        merge |= {"base": place.base} if needs_base else {}
        return Job(name, merged_job, (merge, data, training, folder))

    def samples(self, settings: StudySettings) -> int:
        """See `Entrant.samples`."""
        return self.steps * settings.batch_size


@dataclass(frozen=True)
class Distilled(Entrant):
    """A student of the base's architecture that learns the predictions of an ensemble.

    Attributes:
        teacher: the row of the ensemble, which is trained before; the one with the same seed.
        bakes_in: whether the student learns the guided prediction.
    """

    teacher: str = ""
    bakes_in: bool = False

    def job(self, place: Place, settings: StudySettings) -> Job:
        """See `Entrant.job`."""
        folder = self.folder(place)
        ensemble = Aggregated(self.teacher, self.seed).folder(place)
        recipe = DistillRecipe.model_validate(
            {
                "teacher": {"ensemble": str(ensemble)},
                "student": {"init": place.base},
                "trajectories": {
                    "prompts": {"text": str(place.work / TRAINING_PROMPTS)},
                    "number": settings.distilled_pictures,
                    "num_steps": [12, 20, 30],
                    "guidance": GUIDANCE_SCALE,
                    "seed": self.seed,
                },
                "recording": {
                    "folder": str(place.work / "recorded" / f"{slug(self.teacher)}-{self.seed}"),
                    "batch_size": 20,
                    "num_threads": 1,
                },
                "guidance": {"bake_in": GUIDANCE_SCALE} if self.bakes_in else "keep",
                "training": {
                    "num_steps": settings.distilled_steps,
                    "batch_size": 2 * settings.batch_size,
                    "learning_rate": settings.distilled_rate,
                    "num_warmup_steps": min(50, settings.distilled_steps),
                    "checkpoint_every": 250,
                    "keep_checkpoints": 1,
                    "trackers": [],
                    "device": "cpu",
                    "seed": self.seed,
                },
            }
        )
        return Job(f"{place.world}: {folder.name}", distill_job, (recipe, folder))

    def samples(self, settings: StudySettings) -> int:
        """See `Entrant.samples`; those of its teacher are included."""
        own = 2 * settings.batch_size * settings.distilled_steps
        return own + Aggregated(self.teacher).samples(settings)

    def method(self, place: Place) -> dict[str, Any]:
        """See `Entrant.method`."""
        guidance = {"guidance": 1.0} if self.bakes_in else {}
        return {**super().method(place), **guidance}
