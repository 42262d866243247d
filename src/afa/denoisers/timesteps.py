"""From a scheduler's timesteps to those that a family's denoisers take, and back.

Users, recipes and schedulers count timesteps from 0 to `num_train_timesteps` (1000). Most
denoisers take them as they are; pipelines of Flux divide them by 1000 first.
`Family.timestep_divisor` is the one place that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afa.denoisers.family import Family

#: digits after the point that are left when a division in float32 is undone: 700.0, not 699.99999
_DIGITS = 3


def highest_timestep(family: Family, num_train_timesteps: int) -> float:
    """The timestep of pure noise as denoisers of a family take it."""
    return num_train_timesteps / family.timestep_divisor


def in_scheduler_timesteps(
    schedule: Callable[[float], Sequence[int]], family: Family
) -> Callable[[float], Sequence[int]]:
    """A schedule for a family's denoisers, from one that is asked about a scheduler's timesteps.

    Args:
        schedule: answers to a timestep from 0 to `num_train_timesteps`.
        family: of the denoisers, which call the result with the timesteps that they take.
    """
    divisor = family.timestep_divisor
    if divisor == 1:
        return schedule
    return lambda timestep: schedule(round(timestep * divisor, _DIGITS))
