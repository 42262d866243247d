"""Ratios of times: the compared functions alternate within one process, in rounds."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of several values."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def as_json(self) -> dict[str, float]:
        """Return the values, rounded to the precision of timings."""
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """Compute the median and the quartiles; for one value, that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def take_turns(
    functions: Mapping[str, Callable[[], object]], num_rounds: int, num_warmups: int = 1
) -> dict[str, list[float]]:
    """Measure the seconds of every function in every round; the functions alternate."""
    for _ in range(num_warmups):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(num_rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Compute the ratio of two functions' times within each round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])
