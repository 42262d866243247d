"""Nearest to the base: weights by how near each expert's prediction is to the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from afa.aggregators.fusion.loratorio import ByDistance, LoRAtorio
from afa.aggregators.fusion.recipe import FusionRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence


class NearestToBase(LoRAtorio):
    """`LoRAtorio` with the opposite sign: the nearer to the base, the larger the weight.

    Experts that were fine-tuned on a part of what their base knows forget the rest. On prompts of
    its own domain, such an expert predicts much as the base does; on other prompts, it is far away.
    LoRAtorio assumes the contrary: a base that lacks what the experts add, and experts that forgot
    nothing. Not published; docs/log.md has what led to it.

    Args:
        temperature: the smaller, the more of the nearest expert.
        patch: side of a patch in pixels of the latent.
        null: who predicts without prompt.
    """

    sign: ClassVar[int] = -1

    def __init__(
        self,
        temperature: float = 0.01,
        patch: int = 4,
        null: Literal["base", "experts"] = "base",
    ) -> None:
        super().__init__(temperature, patch, null)


class NearestRecipe(ByDistance, FusionRecipe):
    """`rule: nearest`; see `NearestToBase` for its settings. It needs `base` in the recipe."""

    rule: Literal["nearest"] = "nearest"
    temperature: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    patch: int = Field(default=4, ge=1, le=64)

    def rule_of_predictions(self) -> NearestToBase:
        """See `ByDistance.rule_of_predictions`."""
        return NearestToBase(self.temperature, self.patch, self.null)

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row; temperature, patch and the unconditional half are chosen."""
        return {"nearest to the base": cls.grid((0.003, 0.01, 0.03, 0.1))}
