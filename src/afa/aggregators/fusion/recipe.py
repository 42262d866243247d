"""`FusionRecipe`, the base of fusion without training: a method's settings and its rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from afa.recipe import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.aggregators import FusionRule
    from afa.aggregators.rule import Schedule
    from afa.denoisers import Site


class FusionRecipe(Section, ABC):
    """A method that fuses experts without training.

    To add a method to all comparisons, add a module with a subclass to this folder. The field
    `rule: Literal[...]`, with itself as default, is its name in recipes; the other fields are its
    settings.
    """

    #: whether its weights are a softmax of logits, to which drafts can add a bias
    takes_drafts: ClassVar[bool] = False
    #: whether the base of the comparison is one more expert, the last one
    with_base: ClassVar[bool] = False

    rule: str

    @property
    def needs_halves(self) -> bool:
        """Whether it needs both halves of guidance in one batch."""
        return False

    @abstractmethod
    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """The fusion rules of an ensemble, one per site, in site order."""

    def schedule(self, num_experts: int, num_train_timesteps: int) -> Schedule | None:
        """The schedule of the experts; None runs all experts at every timestep.

        Args:
            num_experts: N.
            num_train_timesteps: the scheduler's number of timesteps. The schedule is a function of
                the scheduler's timesteps, for every family.
        """
        return None

    def check(self, num_experts: int, guidance: float) -> None:
        """Check that the settings fit a comparison.

        Args:
            num_experts: the number of experts in the comparison.
            guidance: its guidance scale; up to 1 there is no unconditional half.

        Raises:
            ValueError: if they do not; its text continues a sentence with the recipe as subject.
        """

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """Its rows in `make results`, each with the settings to choose from; by default none.

        The best settings on separate tuning prompts are chosen; a single one is used unchanged.

        Args:
            experts: the experts' names, in the order of the ensemble.
        """
        return {}


def check_expert_numbers(numbers: Sequence[int], num_experts: int) -> None:
    """Check that numbers of experts are in range.

    Raises:
        ValueError: if one is not.
    """
    if any(not 0 <= number < num_experts for number in numbers):
        raise ValueError(
            f"must number its {num_experts} experts from 0 to {num_experts - 1}; got "
            f"{list(numbers)}"
        )
