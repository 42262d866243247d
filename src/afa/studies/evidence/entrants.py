"""What enters a comparison: how each row is made, and what it costs in all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from afa.aggregators import SABWSettings
from afa.evaluation.recipe import slug
from afa.evaluation.work import digest
from afa.loading.expert_source import ExpertSource
from afa.merging.recipe import WITH_BASE
from afa.studies.evidence.jobs import lora_job, merged_job, tuned_job
from afa.studies.results.jobs import Job, train_aggregators_job
from afa.studies.worlds.recipe import BASE, WORLDS
from afa.training.recipe import DataRecipe, Recipe, ScenesRecipe, TrainingRecipe
from afa.zoo.models import AGGREGATOR

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.studies.evidence.settings import EvidenceSettings
    from afa.studies.worlds.recipe import WorldRecipe

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
    def job(self, place: Place, settings: EvidenceSettings) -> Job:
        """The job that trains it, or resumes."""

    @abstractmethod
    def samples(self, settings: EvidenceSettings) -> int:
        """The pictures that this training sees, without those of experts and base."""

    def method(self, place: Place) -> dict[str, Any]:
        """How a recipe of `afa evaluate` names the result."""
        return {"model": str(self.folder(place))}

    def training(self, settings: EvidenceSettings, num_steps: int, rate: float) -> TrainingRecipe:
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

    def data(self, place: Place, settings: EvidenceSettings) -> ScenesRecipe:
        """Its data."""
        return scenes_of(place, self.seed, self.number or settings.num_pictures)


@dataclass(frozen=True)
class Aggregated(Entrant):
    """Aggregators on a world's experts.

    Attributes:
        changes: settings of the aggregators that differ from the zoo's.
        steps: optimizer steps; None for those of the settings.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    def job(self, place: Place, settings: EvidenceSettings) -> Job:
        """See `Entrant.job`."""
        chosen = {each.name: getattr(AGGREGATOR, each.name) for each in fields(SABWSettings)}
        recipe = Recipe(
            experts=[ExpertSource(source) for source in place.experts.values()],
            data=DataRecipe(scenes=self.data(place, settings)),
            aggregator=replace(SABWSettings(**chosen), **self.changes),
            training=self.training(settings, self._steps(settings), settings.aggregator_rate),
        )
        folder = self.folder(place)
        return Job(f"{place.world}: {folder.name}", train_aggregators_job, (recipe, folder))

    def samples(self, settings: EvidenceSettings) -> int:
        """See `Entrant.samples`."""
        return self._steps(settings) * settings.batch_size

    def method(self, place: Place) -> dict[str, Any]:
        """See `Entrant.method`."""
        return {"ensemble": str(self.folder(place))}

    def _steps(self, settings: EvidenceSettings) -> int:
        return self.steps or settings.aggregator_steps


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

    def job(self, place: Place, settings: EvidenceSettings) -> Job:
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

    def samples(self, settings: EvidenceSettings) -> int:
        """See `Entrant.samples`."""
        return self.steps * settings.batch_size
