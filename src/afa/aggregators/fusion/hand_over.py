"""Timestep hand-over: each expert denoises a range of timesteps alone."""

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
    from collections.abc import Iterable, Sequence

    from afa.aggregators import FusionRule
    from afa.denoisers import Site

_MAX_PERMUTED = 4  # experts of which all orders are candidates


@dataclass(frozen=True)
class HandOver:
    """A schedule with one expert per timestep, as in eDiff-I (Balaji et al., arXiv 2211.01324).

    Set it as `EnsembleDenoiser.schedule`; the other experts do not run. An ensemble calls its
    schedule with its denoisers' timesteps, which are 0 to 1 for Flux; convert a schedule in the
    scheduler's timesteps with `afa.denoisers.timesteps.in_scheduler_timesteps`.

    Args:
        order: the numbers of the experts; the first one starts with pure noise.
        boundaries: falling timesteps below which the next expert runs, one fewer than experts.

    Raises:
        AfaError: if the boundaries do not fall, or their number is wrong.
    """

    order: Sequence[int]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False))
        if len(self.boundaries) != len(self.order) - 1 or not falls:
            raise AfaError(
                "AFA-FUSION-002",
                f"A hand-over between {len(self.order)} experts must have "
                f"{len(self.order) - 1} falling boundaries; got {list(self.boundaries)}.",
            )

    @classmethod
    def evenly(cls, order: Sequence[int], num_train_timesteps: int = 1000) -> HandOver:
        """Give every expert an equal range of timesteps."""
        count = len(order)
        return cls(order, [num_train_timesteps * (1 - n / count) for n in range(1, count)])

    def __call__(self, timestep: float) -> Sequence[int]:
        """The number of this timestep's expert, in a list; at a boundary, of the earlier expert."""
        return [self.order[sum(timestep < boundary for boundary in self.boundaries)]]


class HandOverRecipe(FusionRecipe):
    """`rule: hand_over`; see `HandOver`. By default every expert has an equal range, in order.

    `boundaries` are timesteps of the scheduler, from 1000 down to 0, for every family.
    """

    rule: Literal["hand_over"] = "hand_over"
    order: list[int] | None = Field(default=None, min_length=1)
    boundaries: list[float] | None = None

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """A mean at every site, over the one expert that runs."""
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
                f"The boundaries of a hand-over must be timesteps of the scheduler, from 1 to "
                f"{num_train_timesteps}, for every family; got {self.boundaries}. Multiply "
                f"fractions by {num_train_timesteps}.",
            )
        return HandOver(order, self.boundaries)

    def check(self, num_experts: int, guidance: float) -> None:
        """Refuse unknown experts, and boundaries that do not fit the experts."""
        check_expert_numbers(self.order or [], num_experts)
        self.schedule(num_experts, max([1000, *map(math.ceil, self.boundaries or ())]))

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row; the order of the experts is chosen among all, of many among their rotations."""
        count = len(experts)
        orders: Iterable[Sequence[int]] = itertools.permutations(range(count))
        if count > _MAX_PERMUTED:
            orders = [[(n + first) % count for n in range(count)] for first in range(count)]
        return {"timestep hand-over": [cls(order=list(order)) for order in orders]}
