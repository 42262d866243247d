"""Means and paired differences of scores of the same prompts, with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    #: scores of one method, [replicas, prompts]
    Scores = NDArray[np.float64]
    #: the cluster of each prompt, from 0, [prompts]
    Clusters = NDArray[np.int64]

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


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two methods, prompt by prompt.

    `difference` is the mean of the paired differences; `wins`, `losses` and `ties` count prompts;
    `p_value` is that of the exact two-sided sign test (for binary outcomes, McNemar's test). Unlike
    a bootstrap, it is not overconfident with few prompts.
    """

    difference: Interval
    wins: int
    losses: int
    ties: int
    p_value: float


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value for equally probable wins and losses."""
    wins, losses = int(wins), int(losses)  # integers of NumPy overflow from 63 pairs on
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method, in the given order.

    The probability that any true null hypothesis is rejected stays below the level (Holm, 1979,
    A simple sequentially rejective multiple test procedure).
    """
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = largest
    return adjusted


def wilson(share: float, num_trials: int) -> Interval:
    """Return a proportion with its 95 % interval (Wilson, 1927).

    Args:
        share: from 0 to 1; need not be a whole number of trials.
        num_trials: number of independent trials.

    Raises:
        AfaError: if there are no trials, or the share is outside 0 to 1.
    """
    if not 0 <= share <= 1 or num_trials < 1:
        raise AfaError(
            "AFA-STAT-001",
            f"A proportion must be from 0 to 1, of at least one trial; got {share} of "
            f"{num_trials}.",
        )
    scale = 1 + _Z * _Z / num_trials
    centre = share + _Z * _Z / (2 * num_trials)
    spread = _Z * (share * (1 - share) / num_trials + _Z * _Z / (4 * num_trials**2)) ** 0.5
    # exact ends: rounding could exclude the share from its own interval
    low = 0.0 if share == 0 else (centre - spread) / scale
    high = 1.0 if share == 1 else (centre + spread) / scale
    return Interval(share, low, high)


def mean_interval(
    scores: Scores,
    num_resamples: int = 10_000,
    *,
    is_outcome: bool = False,
    clusters: Clusters | None = None,
) -> Interval:
    """Return the mean of a method's scores with a 95 % interval over prompts and replicas.

    Percentile bootstrap (Efron, 1979) of prompts and replicas. For binary outcomes, it is widened
    to Wilson's interval over the prompts, since the bootstrap of equal outcomes has no width. With
    clusters, Wilson's number of trials is the one with which a proportion would vary as much as the
    resampled means; it is at least the number of clusters, and this if the outcomes are equal.

    Args:
        scores: [replicas, prompts], each the mean over the seeds.
        num_resamples: of the bootstrap.
        is_outcome: whether every single score was 0 or 1.
        clusters: of the prompts, which are drawn together, since their scores are not independent;
            None draws single prompts.
    """
    mean = float(scores.mean())
    resampled = _resampled_means(scores, num_resamples, clusters=clusters)
    drawn = _percentiles(mean, resampled)
    if not is_outcome:
        return drawn
    trials = scores.shape[1]
    if clusters is not None:
        spread = float(
            _resampled_means(scores.mean(0, keepdims=True), num_resamples, 0, clusters).var()
        )
        alike = mean * (1 - mean) / spread if spread > 0 else 0.0
        trials = int(min(max(alike, len(np.unique(clusters))), trials))
    bounds = wilson(mean, trials)
    return Interval(mean, min(bounds.low, drawn.low), max(bounds.high, drawn.high))


def paired_difference(
    ours: Scores,
    theirs: Scores,
    num_resamples: int = 10_000,
    *,
    clusters: Clusters | None = None,
) -> Paired:
    """Return the mean difference of two methods on the same prompts, with a 95 % interval.

    Percentile bootstrap: both methods use the same resampled prompts, and each its own resampled
    replicas, so that the interval includes the variance of trainings. With clusters, the sign test
    is that of their mean differences.

    Args:
        ours: [replicas, prompts].
        theirs: [replicas, prompts], with the same number of prompts.
        num_resamples: of the bootstrap.
        clusters: see `mean_interval`.

    Raises:
        AfaError: if the numbers of prompts differ.
    """
    resampled = _resampled_differences(ours, theirs, num_resamples, clusters)
    by_prompt = ours.mean(0) - theirs.mean(0)
    # means over seeds or replicas have rounding errors
    is_tie = np.isclose(by_prompt, 0.0, rtol=0, atol=1e-9)
    wins, losses = int((~is_tie & (by_prompt > 0)).sum()), int((~is_tie & (by_prompt < 0)).sum())
    signs = wins, losses
    if clusters is not None:
        found = [by_prompt[clusters == each].mean() for each in np.unique(clusters)]
        signs = sum(each > 1e-9 for each in found), sum(each < -1e-9 for each in found)
    return Paired(
        _percentiles(float(by_prompt.mean()), resampled),
        wins,
        losses,
        ties=int(is_tie.sum()),
        p_value=sign_test(*signs),
    )


def equivalence(
    ours: Scores,
    theirs: Scores,
    margin: float,
    num_resamples: int = 10_000,
    *,
    clusters: Clusters | None = None,
) -> bool:
    """Whether two methods are equivalent: the 90 % interval of the difference is in the margin.

    These are two one-sided tests at 5 % (Schuirmann, 1987), by a bootstrap that is careful with few
    data. Two clusters are added in which one and the other method is right in everything (Agresti &
    Min, 2005), because without discordant prompts the bootstrap has no width. Replicas are spread
    by the factor that corrects the variance of few of them.

    Args:
        ours: scores from 0 to 1, [replicas, prompts].
        theirs: the same, [replicas, prompts], with the same number of prompts.
        margin: the largest difference of means that does not matter.
        num_resamples: of the bootstrap.
        clusters: see `mean_interval`.

    Raises:
        AfaError: if the numbers of prompts differ.
    """
    num_prompts = ours.shape[1]
    clusters = np.arange(num_prompts) if clusters is None else np.asarray(clusters)
    count = len(np.unique(clusters))
    size = max(1, round(num_prompts / count))
    first, second = _with_doubt(ours, 1, size), _with_doubt(theirs, 0, size)
    added = np.repeat([clusters.max() + 1, clusters.max() + 2], size)
    resampled = _resampled_differences(
        first, second, num_resamples, np.concatenate([clusters, added])
    )
    low, high = np.quantile(resampled, (0.05, 0.95))
    return bool(-margin < low and high < margin)


def _with_doubt(scores: Scores, first: float, size: int) -> Scores:
    """Scores with their replicas spread, and two more clusters: `first`, then the opposite."""
    count = len(scores)
    if count > 1:
        means = scores.mean(1, keepdims=True)
        spread = (count / (count - 1)) ** 0.5
        scores = scores + (spread - 1) * (means - means.mean())
    added = np.repeat([[first, 1 - first]], size, axis=1).repeat(count, axis=0)
    return np.concatenate([scores, added], axis=1)


def _resampled_differences(
    ours: Scores, theirs: Scores, num_resamples: int, clusters: Clusters | None
) -> NDArray[np.float64]:
    if ours.shape[1] != theirs.shape[1]:
        raise AfaError(
            "AFA-STAT-002",
            f"Paired scores must be of the same prompts; got {ours.shape[1]} and "
            f"{theirs.shape[1]} prompts.",
        )
    first = _resampled_means(ours, num_resamples, stream=1, clusters=clusters)
    second = _resampled_means(theirs, num_resamples, stream=2, clusters=clusters)
    return first - second


def _resampled_means(
    scores: Scores, num_resamples: int, stream: int = 0, clusters: Clusters | None = None
) -> NDArray[np.float64]:
    """Return means over resampled prompts and replicas, [resamples].

    The resampled prompts depend only on the prompts and their clusters, the replicas also on
    `stream`.
    """
    num_replicas, num_prompts = scores.shape
    drawn = [
        draws @ scores.T / draws.sum(1, keepdims=True)
        for draws in _prompt_draws(num_prompts, num_resamples, clusters)
    ]
    by_replica = np.concatenate(drawn)  # [resamples, replicas]
    if num_replicas == 1:
        return by_replica[:, 0]
    rng = np.random.default_rng([_SEED, num_replicas, stream])
    counts = rng.multinomial(
        num_replicas, np.full(num_replicas, 1 / num_replicas), size=num_resamples
    )
    return (by_replica * counts).sum(1) / num_replicas


def _prompt_draws(
    num_prompts: int, num_resamples: int, clusters: Clusters | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield how often every prompt is drawn, [resamples, prompts], in chunks of resamples."""
    if clusters is not None and len(clusters) != num_prompts:
        raise AfaError(
            "AFA-STAT-003",
            f"There must be one cluster for each prompt; got {len(clusters)} clusters and "
            f"{num_prompts} prompts.",
        )
    if clusters is not None:
        clusters = np.unique(clusters, return_inverse=True)[1]
    count = num_prompts if clusters is None else int(clusters.max()) + 1
    rng = np.random.default_rng([_SEED, count])
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        draws = rng.multinomial(count, np.full(count, 1 / count), size=size)
        yield draws if clusters is None else draws[:, clusters]


def _percentiles(mean: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(mean, float(low), float(high))
