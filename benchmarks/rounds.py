"""Times as ratios: what is compared takes turns within one process, round after round."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Spread:
    """Of several values: the median, and the middle half of them."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def as_json(self) -> dict[str, float]:
        """Rounded to what such timings mean."""
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def take_turns(
    functions: Mapping[str, Callable[[], object]], num_rounds: int, num_warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every function in every round; functions run in their order, over and over."""
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
    """The ratio of two functions within each round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])
