"""Timestep hand-over: one expert at a time, from noise to picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class HandOver:
    """Which expert denoises at a timestep, as in eDiff-I (Balaji et al., 2022, arXiv 2211.01324).

    Takes the place of `EnsembleDenoiser`'s schedule, so that the other experts do not run at all.

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
                f"A hand-over between {len(self.order)} experts must have "
                f"{len(self.order) - 1} falling boundaries, came {list(self.boundaries)}."
            )

    @classmethod
    def evenly(cls, order: Sequence[int], num_train_timesteps: int = 1000) -> HandOver:
        """Equal shares of the timesteps for every expert."""
        count = len(order)
        return cls(order, [num_train_timesteps * (1 - n / count) for n in range(1, count)])

    def __call__(self, timestep: float) -> Sequence[int]:
        """The one expert of this timestep; at a boundary it is still the earlier one."""
        return [self.order[sum(timestep < boundary for boundary in self.boundaries)]]
