"""Convert between the timesteps of a scheduler and those of a family's denoisers.

Users, recipes and schedulers count timesteps from 0 to `num_train_timesteps` (1000). Most denoisers
take the same values; pipelines of Flux, FLUX.2, Chroma and Qwen-Image divide them by 1000 first
(`Family.timestep_divisor`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afa.denoisers.family import Family

#: decimals kept when a division in float32 is undone: 700.0, not 699.99999
_DIGITS = 3


def highest_timestep(family: Family, num_train_timesteps: int) -> float:
    """The timestep of pure noise, in the units of a family's denoisers."""
    return num_train_timesteps / family.timestep_divisor


def in_scheduler_timesteps(
    schedule: Callable[[float], Sequence[int]], family: Family
) -> Callable[[float], Sequence[int]]:
    """Convert a schedule in the scheduler's timesteps to one in a family's timesteps.

    Args:
        schedule: a function of a timestep from 0 to `num_train_timesteps`.
        family: the family whose denoisers call the result, with timesteps in their own units.
    """
    divisor = family.timestep_divisor
    if divisor == 1:
        return schedule
    return lambda timestep: schedule(round(timestep * divisor, _DIGITS))
