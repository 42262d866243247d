"""Whether a process has grown: a robust slope, or the highest of its counts, curve by curve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

_Z = 1.959963984540054  # of a two-sided 95 % interval
#: rounds that are left out at the least, and that must be left then
MIN_WARM_UP, MIN_ROUNDS = 3, 6
#: what must not grow at all: whatever a round opens, it closes
COUNTS = ("fds", "threads", "children", "tensors", "tensor_bytes", "cached", "deleted", "disk")
#: what must not happen at all
NEVER = ("unseen",)
#: What may grow by this share over the whole time, which is a little more than it varies by itself.
#: A fifth of the anonymous memory is what the C library keeps, and that goes up and down by a fifth
#: of itself. What it has given out, and what Python has, does not: a leak is seen there first.
SHARES = {
    "anonymous": 0.05,
    "allocated": 0.005,
    "blocks": 0.002,
    "objects": 0.002,
    "maps": 0.05,
}
#: whose figures are bytes
BYTES = ("anonymous", "allocated", "tensor_bytes", "disk")
Outcome = Literal["flat", "grew", "unclear"]


@dataclass(frozen=True)
class Slope:
    """A slope and its 95 % interval."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Finding:
    """What is to be said of one curve.

    Attributes:
        curve: its name.
        outcome: `unclear` is what varies too much, or was seen too shortly, to be called flat.
        before: the highest of the first third after the warm-up.
        after: the highest of the last third.
        limit: how much may be added over the whole time.
        added: how much was, by the slope; for counts by `before` and `after`.
        at_most: the upper end of its 95 % interval.
        per_hour: `added`, but in an hour.
    """

    curve: str
    outcome: Outcome
    before: float
    after: float
    limit: float
    added: float
    at_most: float
    per_hour: float

    def as_json(self) -> dict[str, Any]:
        """Rounded to what such figures mean."""
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Verdict:
    """What is to be said of all curves.

    Attributes:
        warm_up: rounds that were left out.
        rounds: that were not.
        hours: over which they were.
        findings: one for each curve; none where there were too few rounds.
    """

    warm_up: int
    rounds: int
    hours: float
    findings: tuple[Finding, ...]

    @property
    def is_flat(self) -> bool:
        """Whether there were enough rounds, and nothing in them grew."""
        return bool(self.findings) and all(each.outcome == "flat" for each in self.findings)

    def lines(self) -> list[str]:
        """What a person reads."""
        if not self.findings:
            return [
                f"Too few rounds: after {MIN_WARM_UP} of warm-up there must be {MIN_ROUNDS}, there "
                f"were {self.rounds}. Give it more time."
            ]
        shown = [_line(each) for each in self.findings]
        grown = [each.curve for each in self.findings if each.outcome == "grew"]
        unclear = [each.curve for each in self.findings if each.outcome == "unclear"]
        said = "All is flat."
        if grown or unclear:
            said = " ".join(
                f"{what}: {', '.join(names)}."
                for what, names in (("Grew", grown), ("Not shown to be flat", unclear))
                if names
            )
        span = f"{self.rounds} rounds in {60 * self.hours:.0f} minutes"
        return [*shown, f"{span}, after {self.warm_up} of warm-up. {said}"]


def judge(curves: Mapping[str, Sequence[float]], hours: Sequence[float]) -> Verdict:
    """Tell curves that are flat from those that have grown.

    The first quarter of the rounds is warm-up, and three at the least: libraries load what they
    need, and the C library's heaps find their size.

    Args:
        curves: the values of each after every round; only those of `SHARES`, `COUNTS` and
            `NEVER` count.
        hours: when they were taken.
    """
    warm_up = max(MIN_WARM_UP, len(hours) // 4)
    times = np.asarray(hours[warm_up:], dtype=np.float64)
    if len(times) < MIN_ROUNDS:
        return Verdict(warm_up, len(times), 0.0, ())
    findings = []
    for name, given in curves.items():
        values = np.asarray(given, dtype=np.float64)
        if name in SHARES:
            findings.append(_level(name, times, values[warm_up:], SHARES[name]))
        elif name in COUNTS:
            findings.append(_count(name, times, *_highest(values[warm_up:])))
        elif name in NEVER:
            findings.append(_count(name, times, 0.0, float(values.max())))
    return Verdict(warm_up, len(times), float(times[-1] - times[0]), tuple(findings))


def _count(name: str, times: np.ndarray, before: float, after: float) -> Finding:
    """Of what must not grow: the highest at the end is no more than the highest before."""
    added = after - before
    return Finding(
        name,
        "grew" if added > 0 else "flat",
        before,
        after,
        limit=0.0,
        added=added,
        at_most=added,
        per_hour=added / float(times[-1] - times[0]),
    )


def _highest(values: np.ndarray) -> tuple[float, float]:
    first, last = _thirds(values)
    return float(first.max()), float(last.max())


def _level(name: str, times: np.ndarray, values: np.ndarray, share: float) -> Finding:
    """Of what varies: neither its slope, even at the worst, nor its end is above the limit.

    The slope is over all rounds; one that begins to grow late has a flat one, but a higher end.
    """
    slope = theil_sen(times, values)
    hours = float(times[-1] - times[0])
    before, after = _highest(values)
    first, last = _thirds(values)
    limit = share * float(np.median(values))
    at_most = slope.high * hours
    rise = float(np.median(last) - np.median(first))
    outcome: Outcome = "flat"
    if at_most > limit or rise > limit:
        outcome = "grew" if slope.low > 0 or rise > limit else "unclear"
    return Finding(
        name,
        outcome,
        before,
        after,
        limit,
        added=max(slope.middle * hours, rise, key=abs),
        at_most=max(at_most, rise),
        per_hour=slope.middle,
    )


def _thirds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last third."""
    size = len(values) // 3
    return values[:size], values[-size:]


def theil_sen(times: ArrayLike, values: ArrayLike) -> Slope:
    """The median of the slopes between all pairs of points, with its 95 % interval (Sen, 1968).

    A few rounds that are far off do not move it. The interval takes what is left beside the slope
    to be independent; of a curve that wanders it is too narrow.

    Args:
        times: all different.
        values: one for each.
    """
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    count, ties = len(y), np.unique(y, return_counts=True)[1]
    # Kendall's variance of the number of pairs that rise, less those that fall
    variance = (
        count * (count - 1) * (2 * count + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()
    ) / 18
    half = _Z * np.sqrt(max(float(variance), 0.0))
    low = max(int(np.floor((len(slopes) - half) / 2)), 0)
    high = min(int(np.ceil((len(slopes) + half) / 2)), len(slopes) - 1)
    return Slope(float(slopes[low]), float(np.median(slopes)), float(slopes[high]))


def _line(finding: Finding) -> str:
    def of(value: float) -> str:
        if finding.curve in BYTES:
            return f"{value / 1e6:,.2f} MB"
        return f"{value:,.0f}"

    return (
        f"{finding.curve:>12}: {of(finding.before)} before, {of(finding.after)} after; at most "
        f"{of(finding.at_most)} added, may be {of(finding.limit)}: {finding.outcome}"
    )
