"""Timestep hand-over: one expert at a time, from noise to picture."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from afa.aggregators.fusion.mean import feature_mean
from afa.aggregators.fusion.recipe import FusionRecipe, check_expert_numbers
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.aggregators import FusionRule
    from afa.denoisers import Site


@dataclass(frozen=True)
class HandOver:
    """Which expert denoises at a timestep, as in eDiff-I (Balaji et al., 2022, arXiv 2211.01324).

    Takes the place of `EnsembleDenoiser`'s schedule, so that the other experts do not run at all.
    An ensemble asks its schedule about timesteps as its denoisers take them, which Flux counts from
    0 to 1: `afa.denoisers.timesteps.in_scheduler_timesteps` converts a schedule of the scheduler's.

    Args:
        order: the experts by number, the first one starts with pure noise.
        boundaries: timesteps at which the next expert takes over, falling; one less than experts.

    Raises:
        AfaError: boundaries that do not fall, or another number of them.
    """

    order: Sequence[int]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False))
        if len(self.boundaries) != len(self.order) - 1 or not falls:
            raise AfaError(
                "AFA-FUSION-002",
                f"A hand-over between {len(self.order)} experts must have "
                f"{len(self.order) - 1} falling boundaries, came {list(self.boundaries)}.",
            )

    @classmethod
    def evenly(cls, order: Sequence[int], num_train_timesteps: int = 1000) -> HandOver:
        """Equal shares of the timesteps for every expert."""
        count = len(order)
        return cls(order, [num_train_timesteps * (1 - n / count) for n in range(1, count)])

    def __call__(self, timestep: float) -> Sequence[int]:
        """The one expert of this timestep; at a boundary it is still the earlier one."""
        return [self.order[sum(timestep < boundary for boundary in self.boundaries)]]


class HandOverRecipe(FusionRecipe):
    """`rule: hand_over`; see `HandOver`. By default equal shares in the order of the experts.

    `boundaries` are timesteps of the scheduler, from 1000 down to 0, for every family.
    """

    rule: Literal["hand_over"] = "hand_over"
    order: list[int] | None = Field(default=None, min_length=1)
    boundaries: list[float] | None = None

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """Means, of the one expert that runs."""
        return feature_mean(sites)

    def schedule(self, num_experts: int, num_train_timesteps: int) -> HandOver:
        """The hand-over itself."""
        order = self.order or range(num_experts)
        if self.boundaries is None:
            return HandOver.evenly(order, num_train_timesteps)
        outside = [b for b in self.boundaries if not 1 <= b <= num_train_timesteps]
        if outside:
            raise AfaError(
                "AFA-FUSION-003",
                f"A hand-over has the boundaries {self.boundaries}; they must be timesteps of the "
                f"scheduler, from 1 to {num_train_timesteps}, for every family. Where they are "
                f"shares of the noise, multiply them by {num_train_timesteps}.",
            )
        return HandOver(order, self.boundaries)

    def check(self, num_experts: int, guidance: float) -> None:
        """Refuse experts that are not there, and boundaries that do not fit them."""
        check_expert_numbers(self.order or [], num_experts)
        self.schedule(num_experts, max([1000, *map(math.ceil, self.boundaries or ())]))

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row, in any order."""
        orders = itertools.permutations(range(len(experts)))
        return {"timestep hand-over": [cls(order=list(order)) for order in orders]}
