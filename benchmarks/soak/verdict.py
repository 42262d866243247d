"""Decide for each curve whether it has grown, by a robust slope or by its maximum."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

_Z = 1.959963984540054  # for a two-sided 95 % interval
#: the minimum numbers of warm-up rounds and of further rounds
MIN_WARM_UP, MIN_ROUNDS = 3, 6
#: curves that must not grow at all: a round closes whatever it opens
COUNTS = ("fds", "threads", "children", "tensors", "tensor_bytes", "cached", "deleted", "disk")
#: counts that must stay zero
NEVER = ("unseen",)
#: Allowed growth over the whole time, as a fraction: slightly more than the normal variation. A
#: fifth of the anonymous memory is free memory that the C library keeps, and that varies by a fifth
#: of itself. The memory that is allocated there and in Python does not vary so, and shows a leak
#: first.
SHARES = {
    "anonymous": 0.05,
    "allocated": 0.005,
    "blocks": 0.002,
    "objects": 0.002,
    "maps": 0.05,
}
#: curves in bytes
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
    """The verdict on one curve.

    Attributes:
        curve: The name of the curve.
        outcome: `unclear` if it varies too much, or was measured too briefly, to be called flat.
        before: The maximum in the first third after the warm-up.
        after: The maximum in the last third.
        limit: The allowed growth over the whole time.
        added: The measured growth, from the slope; for counts, from `before` and `after`.
        at_most: The upper end of its 95 % interval.
        per_hour: The growth per hour.
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
        """Return the values, rounded to a meaningful precision."""
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Verdict:
    """The verdict on all curves.

    Attributes:
        warm_up: The number of warm-up rounds, which are not judged.
        rounds: The number of judged rounds.
        hours: The duration of the judged rounds.
        findings: One for each curve; empty if there were too few rounds.
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
        """Format the verdict as lines of text."""
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
    """Find the curves that have grown.

    The first quarter of the rounds, and at least three, is warm-up: libraries load their modules,
    and the C library's heaps reach their size.

    Args:
        curves: The values of each curve after every round; only those in `SHARES`, `COUNTS` and
            `NEVER` are judged.
        hours: The times of the measurements.
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
    """Judge a curve that must not grow: its maximum at the end must not exceed that before."""
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
    """Judge a curve that varies: neither its slope's upper bound nor its end exceeds the limit.

    The slope covers all rounds. A curve that begins to grow late has a flat slope but a higher end.
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
    """Return the first and the last third."""
    size = len(values) // 3
    return values[:size], values[-size:]


def theil_sen(times: ArrayLike, values: ArrayLike) -> Slope:
    """Compute the median slope between all pairs of points, with its 95 % interval (Sen, 1968).

    A few outliers do not change it. The interval assumes independent residuals, so it is too narrow
    for a curve that drifts.

    Args:
        times: All different.
        values: One for each time.
    """
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    count, ties = len(y), np.unique(y, return_counts=True)[1]
    # Kendall's variance of the number of rising pairs minus falling pairs
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
