"""`Rival`, the base of what draws in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from afa.evaluation.cost import Cost
from afa.evaluation.recipe import SamplingRecipe
from afa.loading.weights import hash_files
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from afa.studies.results.entrants import Place

#: as all methods of the study are drawn
SAMPLING = SamplingRecipe(guidance=GUIDANCE_SCALE)


@dataclass(frozen=True)
class Rival(ABC):
    """A rival that draws pictures of prompts with a world's experts.

    Attributes:
        place: the world.
        num_steps: denoising steps.
    """

    place: Place
    num_steps: int

    row: ClassVar[str]

    def identity(self) -> dict[str, Any]:
        """The settings, and digests of the models, as JSON: what its pictures depend on."""
        settings = {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name != "place"}
        models = {
            name: hash_files(Path(source), Path(source).rglob("*.safetensors"))
            for name, source in {"base": self.place.base, **self.place.experts}.items()
        }
        return {"row": self.row, "world": self.place.world, **settings, "models": models}

    @abstractmethod
    def open(self) -> Drawer:
        """Load the models."""


class Drawer(ABC):
    """Draws batches; the models are loaded."""

    @abstractmethod
    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """Draw the pictures of some prompts, whose noise depends on their numbers and the seed."""


def added(one: Cost, other: Cost) -> Cost:
    """The cost of both."""
    peaks = [each.peak_memory for each in (one, other) if each.peak_memory is not None]
    return Cost(
        (one.seconds or 0) + (other.seconds or 0),
        max(peaks, default=None),
        (one.expert_calls or 0) + (other.expert_calls or 0),
        other.measured_on,
    )
