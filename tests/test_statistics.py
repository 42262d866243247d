"""Intervals: against closed forms, coverage by simulation, and pairing that must matter."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from afa.statistics import (
    Interval,
    equivalence,
    mean_interval,
    paired_difference,
    sign_test,
    wilson,
)
from tests.refusal import refusal


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes / trials, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(1 - successes / trials, trials)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_share_lies_in_its_interval() -> None:
    for trials in range(1, 100):
        for successes in range(trials + 1):
            interval = wilson(successes / trials, trials)
            assert 0 <= interval.low <= successes / trials <= interval.high <= 1


def test_impossible_shares() -> None:
    with refusal("AFA-STAT-001", "0", "1"):
        wilson(1.1, 5)
    with refusal("AFA-STAT-001"):
        wilson(0.5, 0)


def test_outcomes_never_have_an_interval_without_width() -> None:
    interval = mean_interval(np.zeros((1, 50)), is_outcome=True)
    assert interval.low == 0
    assert 0.02 < interval.high < 0.1
    # three trainings of which one went wrong: wider than the prompts alone would say
    replicas = np.repeat([[1.0], [1.0], [0.0]], 50, axis=1)
    wide = mean_interval(replicas, is_outcome=True)
    assert wide.high - wide.low > 2 * (wilson(2 / 3, 50).high - wilson(2 / 3, 50).low)


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    scores = np.random.default_rng(0).normal(3.0, 2.0, size=(1, 400))
    interval = mean_interval(scores)
    error = 1.96 * scores.std() / 20
    assert interval.mean == scores.mean()
    assert interval.low == pytest.approx(scores.mean() - error, abs=0.03)
    assert interval.high == pytest.approx(scores.mean() + error, abs=0.03)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 5, size=200)
    theirs = difficulty + rng.normal(0, 0.1, size=200)
    ours = difficulty + 0.2 + rng.normal(0, 0.1, size=200)
    paired = paired_difference(ours[None], theirs[None])
    assert paired.difference.low > 0.15
    assert paired.difference.high < 0.25
    shuffled = paired_difference(rng.permutation(ours)[None], theirs[None])
    assert shuffled.difference.low <= 0 <= shuffled.difference.high


def test_coverage_is_about_95_percent() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        ours, theirs = rng.normal(0.3, 1, (1, 60)), rng.normal(0, 1, (1, 60))
        interval = paired_difference(ours, theirs, 1000).difference
        hits += interval.low <= 0.3 <= interval.high
    assert 0.89 < hits / 200 < 0.99


def test_luck_of_the_training_widens_the_interval() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 0.1, size=100)
    lucky = np.stack([prompts + luck for luck in (-1.0, 0.0, 1.0)])
    same = np.stack([prompts] * 3)
    rival = np.zeros((1, 100))
    wide, narrow = (paired_difference(s, rival).difference for s in (lucky, same))
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_wins_losses_and_ties() -> None:
    thirds = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    paired = paired_difference(thirds, np.array([[2 / 3, 1.0, 0.0, 0.0]]))
    assert (paired.wins, paired.losses, paired.ties) == (1, 1, 2)
    assert paired.difference.mean == pytest.approx(thirds.mean() - 5 / 12)


@pytest.mark.parametrize("count", [62, 63, 65, 168])
def test_large_differences_of_many_clusters_are_significant(count: int) -> None:
    clusters = np.arange(count).repeat(2)
    ours, theirs = np.ones((1, 2 * count)), np.zeros((1, 2 * count))
    p_value = paired_difference(ours, theirs, 100, clusters=clusters).p_value
    assert p_value == pytest.approx(2.0 ** (1 - count), rel=1e-9)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(4, 0, 0.125), (0, 4, 0.125), (5, 5, 1.0), (9, 1, 22 / 1024), (0, 0, 1)],
)
def test_the_sign_test_is_exact(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p)


def test_a_few_wins_are_not_certain() -> None:
    ours = np.zeros((1, 32))
    ours[0, :4] = 1
    paired = paired_difference(ours, np.zeros((1, 32)))
    assert paired.difference.low > 0, "what the bootstrap alone would say"
    assert paired.p_value == 0.125


def test_many_prompts_take_little_memory() -> None:
    # 10,000 resamples of 20,000 prompts would be 1.6 GB at once
    tracemalloc.start()
    mean_interval(np.random.default_rng(0).random((1, 20_000)), 1000)
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


def test_the_same_every_time_and_antisymmetric() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.random((3, 40)), rng.random((1, 40))
    assert paired_difference(ours, theirs) == paired_difference(ours, theirs)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.difference.low == pytest.approx(-back.difference.high, abs=0.03)


def test_other_prompts_are_refused() -> None:
    with refusal("AFA-STAT-002", "3", "4"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_how_an_interval_reads() -> None:
    assert str(Interval(0.5, 0.4, 0.6)) == "0.50 [0.40, 0.60]"


def test_prompts_of_one_cluster_count_once() -> None:
    """Twelve copies of each score say no more than one."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(1, 60))
    copies, clusters = np.repeat(scores, 12, axis=1), np.repeat(np.arange(60), 12)
    one, clustered = mean_interval(scores), mean_interval(copies, clusters=clusters)
    assert (clustered.low, clustered.high) == pytest.approx((one.low, one.high), abs=1e-12)
    assert mean_interval(copies).high - mean_interval(copies).low < (one.high - one.low) / 3
    theirs = rng.normal(size=(1, 60))
    paired = paired_difference(copies, np.repeat(theirs, 12, axis=1), clusters=clusters)
    assert paired.difference.low == pytest.approx(
        paired_difference(scores, theirs).difference.low, abs=1e-12
    )
    alone = np.arange(60)
    assert mean_interval(scores, clusters=alone) == one
    with refusal("AFA-STAT-003", "12", "60"):
        mean_interval(scores, clusters=np.zeros(12, dtype=np.int64))


def test_clustered_intervals_cover_the_truth() -> None:
    """Of pairs with an effect of their own, as those of two objects in several pictures."""
    rng = np.random.default_rng(4)
    clusters, truth, covered = np.repeat(np.arange(65), 6), 0.8, 0
    for _ in range(200):
        share = np.clip(rng.beta(4, 1, size=65), 0, 1)
        scores = (rng.random(390) < share[clusters]).astype(float)[None]
        interval = mean_interval(scores, 1_000, clusters=clusters)
        covered += interval.low <= truth <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def outcomes(count: int, share: float, seed: int) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = np.zeros((1, count))
    drawn[:, : round(share * count)] = 1
    return np.random.default_rng(seed).permuted(drawn, axis=1)


def test_equivalence_needs_a_margin_and_enough_prompts() -> None:
    assert equivalence(outcomes(2000, 0.9, 0), outcomes(2000, 0.9, 1), 0.05)
    assert not equivalence(outcomes(20, 0.9, 0), outcomes(20, 0.9, 1), 0.05)
    assert not equivalence(outcomes(2000, 0.9, 0), outcomes(2000, 0.8, 1), 0.05)
    assert not equivalence(np.ones((1, 10)), np.ones((1, 10)), 0.05), "ten prompts say nothing"
    assert equivalence(np.ones((1, 400)), np.ones((1, 400)), 0.05)
    # trainings that vary more than the margin
    varied = np.concatenate([outcomes(2000, share, 0) for share in (0.7, 0.9, 0.95)])
    assert not equivalence(varied, outcomes(2000, varied.mean(), 1), 0.05)


def test_few_prompts_are_rarely_called_equivalent_at_the_margin() -> None:
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(300):
        ours, theirs = ((rng.random((1, 20)) < share).astype(np.float64) for share in (0.98, 0.93))
        wrong += equivalence(ours, theirs, 0.05, 500)
    assert wrong / 300 < 0.05


def test_clusters_of_equal_outcomes_are_as_many_trials() -> None:
    clusters = np.repeat(np.arange(10), 39)
    interval = mean_interval(np.ones((1, 390)), is_outcome=True, clusters=clusters)
    assert interval.low == wilson(1.0, 10).low
    gaps = mean_interval(np.ones((1, 4)), is_outcome=True, clusters=np.array([3, 3, 7, 7]))
    assert gaps.low == wilson(1.0, 2).low
    two = np.repeat([0, 1], 25)
    paired = paired_difference(np.ones((1, 50)), np.zeros((1, 50)), clusters=two)
    assert (paired.wins, paired.p_value) == (50, 0.5)
    # prompts that vary on their own are as many trials as they are
    own = np.random.default_rng(0).permuted(outcomes(390, 0.8, 0), axis=1)
    alone, clustered = (
        mean_interval(own, is_outcome=True, clusters=each) for each in (np.arange(390), clusters)
    )
    assert clustered.high - clustered.low < 2 * (alone.high - alone.low)
