"""What a fusion without training is: its name and settings in a recipe, and its rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from afa.recipe import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.aggregators import FusionRule
    from afa.aggregators.rule import Schedule
    from afa.denoisers import Site


class FusionRecipe(Section, ABC):
    """One way to fuse experts without training.

    A module of this folder with a subclass is all it takes to have it in every comparison: its
    field `rule: Literal[...]` is its name in recipes, with itself as default, the other fields are
    its settings.
    """

    rule: str

    @abstractmethod
    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """The fusion rules of an ensemble, one per site, in site order."""

    def schedule(self, num_experts: int, num_train_timesteps: int) -> Schedule | None:
        """Which experts run at a timestep; None is all of them at every one.

        Args:
            num_experts: how many there are.
            num_train_timesteps: of the scheduler, in whose timesteps the answer is asked about,
                whatever the denoisers of a family take.
        """
        return None

    def check(self, num_experts: int, guidance: float) -> None:
        """Refuse settings that do not fit a comparison.

        Args:
            num_experts: how many it has.
            guidance: the scale that it draws with; up to 1 there is no unconditional half.

        Raises:
            ValueError: says what must hold, as the end of "the recipe ...".
        """

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """The rows it has in `make results`, and for each the settings to choose from.

        They are chosen on other prompts than those of the comparison; a single one is taken as it
        is. None by default.

        Args:
            experts: their names, in the order of the ensemble.
        """
        return {}


def check_expert_numbers(numbers: Sequence[int], num_experts: int) -> None:
    """Refuse numbers of experts that are not there.

    Raises:
        ValueError: says how many there are, and what came.
    """
    if any(not 0 <= number < num_experts for number in numbers):
        raise ValueError(
            f"must number its {num_experts} experts from 0 to {num_experts - 1}, came "
            f"{list(numbers)}"
        )
