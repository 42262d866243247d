"""`Rival`, the base of what draws in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from afa.evaluation.cost import Cost
from afa.evaluation.recipe import SamplingRecipe
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from afa.studies.evidence.entrants import Place

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
