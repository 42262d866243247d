"""Means, paired differences and their intervals, from scores of the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    #: scores of one method, [replicas, prompts]
    Scores = NDArray[np.float64]

_Z = 1.959963984540054  # of a two-sided 95 % interval
_CHUNK = 500  # resamples at a time: 120 MB for 30,000 prompts
_SEED = 20_260_901  # the same resamples in every run


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """How much better one method is than another, prompt by prompt.

    `difference` is the mean of the paired differences; `wins`, `losses` and `ties` count prompts;
    `p_value` is that of the exact two-sided sign test on them (McNemar's, of outcomes), which does
    not mistake a few wins for certainty as a bootstrap of few does.
    """

    difference: Interval
    wins: int
    losses: int
    ties: int
    p_value: float


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p value of so many wins, were a win and a loss as likely."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def wilson(share: float, num_trials: int) -> Interval:
    """A proportion with its 95 % interval (Wilson, 1927).

    Args:
        share: from 0 to 1; need not be a whole number of trials.
        num_trials: how many independent trials there were.

    Raises:
        AfaError: no trials, or a share outside of 0 to 1.
    """
    if not 0 <= share <= 1 or num_trials < 1:
        raise AfaError(
            "AFA-STAT-001",
            f"A proportion must be from 0 to 1, of at least one trial; came {share} of "
            f"{num_trials}.",
        )
    scale = 1 + _Z * _Z / num_trials
    centre = share + _Z * _Z / (2 * num_trials)
    spread = _Z * (share * (1 - share) / num_trials + _Z * _Z / (4 * num_trials**2)) ** 0.5
    # the ends are exact, where rounding would put the share itself outside of its interval
    low = 0.0 if share == 0 else (centre - spread) / scale
    high = 1.0 if share == 1 else (centre + spread) / scale
    return Interval(share, low, high)


def mean_interval(
    scores: Scores, num_resamples: int = 10_000, *, is_outcome: bool = False
) -> Interval:
    """The mean of a method's scores, with a 95 % interval over prompts and replicas.

    A percentile bootstrap (Efron, 1979) that draws prompts and replicas. Of outcomes, right or
    wrong, it is widened to Wilson's interval over the prompts, since a bootstrap of none or all
    right has no width.

    Args:
        scores: [replicas, prompts], each the mean over the seeds.
        num_resamples: of the bootstrap.
        is_outcome: whether every single score was 0 or 1.
    """
    mean = float(scores.mean())
    drawn = _percentiles(mean, _resampled_means(scores, num_resamples))
    if not is_outcome:
        return drawn
    bounds = wilson(mean, scores.shape[1])
    return Interval(mean, min(bounds.low, drawn.low), max(bounds.high, drawn.high))


def paired_difference(ours: Scores, theirs: Scores, num_resamples: int = 10_000) -> Paired:
    """The mean difference of two methods on the same prompts, with a 95 % interval.

    Percentile bootstrap: both methods get the same draw of prompts, and each its own draw of its
    replicas, so that the luck of a training counts as much as that of the prompts.

    Args:
        ours: [replicas, prompts].
        theirs: [replicas, prompts]; of as many prompts.
        num_resamples: of the bootstrap.

    Raises:
        AfaError: the methods have different numbers of prompts.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise AfaError(
            "AFA-STAT-002",
            f"Paired scores must be of the same prompts, came {ours.shape[1]} and "
            f"{theirs.shape[1]}.",
        )
    first = _resampled_means(ours, num_resamples, stream=1)
    second = _resampled_means(theirs, num_resamples, stream=2)
    by_prompt = ours.mean(0) - theirs.mean(0)
    # scores of several seeds or replicas are sums of thirds and the like
    is_tie = np.isclose(by_prompt, 0.0, rtol=0, atol=1e-9)
    wins, losses = int((~is_tie & (by_prompt > 0)).sum()), int((~is_tie & (by_prompt < 0)).sum())
    return Paired(
        _percentiles(float(by_prompt.mean()), first - second),
        wins,
        losses,
        ties=int(is_tie.sum()),
        p_value=sign_test(wins, losses),
    )


def _resampled_means(scores: Scores, num_resamples: int, stream: int = 0) -> NDArray[np.float64]:
    """Means over drawn prompts and drawn replicas, [resamples].

    The draws of prompts are the same for any scores of as many prompts; those of replicas go by
    `stream`.
    """
    num_replicas, num_prompts = scores.shape
    drawn = [draws @ scores.T for draws in _prompt_draws(num_prompts, num_resamples)]
    by_replica = np.concatenate(drawn) / num_prompts  # [resamples, replicas]
    if num_replicas == 1:
        return by_replica[:, 0]
    rng = np.random.default_rng([_SEED, num_replicas, stream])
    counts = rng.multinomial(
        num_replicas, np.full(num_replicas, 1 / num_replicas), size=num_resamples
    )
    return (by_replica * counts).sum(1) / num_replicas


def _prompt_draws(num_prompts: int, num_resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often every prompt is drawn, [resamples, prompts], some resamples at a time."""
    rng = np.random.default_rng([_SEED, num_prompts])
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        yield rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=size)


def _percentiles(mean: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(mean, float(low), float(high))
