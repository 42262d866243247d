"""Metrics of features against closed forms, literal loops and torchmetrics."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from afa.metrics import cmmd, cosine_scores, frechet_distance, inception_score, kernel_distance
from tests.refusal import refusal

if TYPE_CHECKING:
    from collections.abc import Callable


class Stored(nn.Module):
    """What torchmetrics takes for a network: features go through as they are."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def normal(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)).double()


def with_moments(num: int, mean: Tensor, root: Tensor, seed: int = 0) -> Tensor:
    """Samples whose mean is exactly `mean` and whose unbiased covariance is ``root^T root``."""
    samples = normal(num, len(mean), seed)
    orthonormal = torch.linalg.qr(samples - samples.mean(0)).Q * math.sqrt(num - 1)
    return mean + orthonormal @ root


def test_fid_of_diagonal_gaussians() -> None:
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    generated = with_moments(50, torch.zeros(3).double(), first.sqrt().diag(), seed=1)
    real = with_moments(40, mean, second.sqrt().diag(), seed=2)
    # |mean|^2 + sum (sqrt a - sqrt b)^2
    expected = 5.25 + 1.0 + 0.0 + 2.5**2
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-12)


def test_fid_of_gaussians_that_do_not_commute() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    b = torch.tensor([[5.0, 0.0], [0.0, 1.0]]).double()
    zero = torch.zeros(2).double()
    generated = with_moments(30, zero, torch.linalg.cholesky(a).T)
    real = with_moments(30, zero, torch.linalg.cholesky(b).T)
    # for 2x2: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det A det B))
    expected = 4 + 6 - 2 * math.sqrt(12 + 2 * math.sqrt(3 * 5))
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-12)


def test_fid_with_fewer_pictures_than_features() -> None:
    line = torch.linspace(-1, 1, 5).double()[:, None]
    direction, other = torch.zeros(1, 64).double(), torch.zeros(1, 64).double()
    direction[0, 3], other[0, 40] = 2.0, 3.0
    variance = line.var().item()
    assert frechet_distance(line * direction, line * other) == pytest.approx(13 * variance)
    assert frechet_distance(line * direction, 2 * line * direction) == pytest.approx(4 * variance)


def test_equal_sets_are_at_distance_zero() -> None:
    features = normal(40, 64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert cmmd(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features + 0.5) == pytest.approx(64 * 0.25)


@pytest.mark.parametrize("num", [40, 300])
def test_fid_agrees_with_torchmetrics(num: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generated, real = normal(num, 24, seed=1) * 2 + 0.5, normal(200, 24, seed=2)
    metric = FrechetInceptionDistance(feature=Stored(24)).set_dtype(torch.float64)
    metric.update(generated, real=False)
    metric.update(real, real=True)
    assert frechet_distance(generated, real) == pytest.approx(metric.compute().item(), rel=1e-9)


def kid_by_loops(generated: Tensor, real: Tensor) -> float:
    def kernel(first: Tensor, second: Tensor) -> float:
        return ((first @ second).item() / len(first) + 1) ** 3

    def within(features: Tensor) -> float:
        pairs = [(i, j) for i in range(len(features)) for j in range(len(features)) if i != j]
        return sum(kernel(features[i], features[j]) for i, j in pairs) / len(pairs)

    across = [kernel(x, y) for x in generated for y in real]
    return within(generated) + within(real) - 2 * sum(across) / len(across)


def test_kid_agrees_with_its_definition() -> None:
    generated, real = normal(9, 5, seed=1) + 0.5, normal(7, 5, seed=2)
    expected = kid_by_loops(generated, real)
    assert kernel_distance(generated, real) == pytest.approx(expected, rel=1e-12)


def test_kid_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, real = normal(60, 16, seed=1) * 1.5, normal(60, 16, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that it keeps all features
        metric = KernelInceptionDistance(feature=Stored(16), subsets=1, subset_size=60)
    metric.set_dtype(torch.float64)
    metric.update(generated, real=False)
    metric.update(real, real=True)
    mean, _ = metric.compute()
    assert kernel_distance(generated, real) == pytest.approx(mean.item(), rel=1e-9)


def test_kid_of_one_distribution_is_around_zero() -> None:
    draws = [kernel_distance(normal(50, 8, s), normal(60, 8, s + 100)) for s in range(40)]
    mean = sum(draws) / len(draws)
    error = torch.tensor(draws).std().item() / math.sqrt(len(draws))
    assert abs(mean) < 3 * error
    assert min(draws) < 0 < max(draws)  # unbiased: not cut off at zero
    assert kernel_distance(normal(50, 8) + 1, normal(60, 8, 1)) > 10 * max(draws)


def test_kid_over_subsets_is_near_that_over_all_and_repeats() -> None:
    generated, real = normal(200, 8, seed=1) + 0.3, normal(200, 8, seed=2)
    state = torch.get_rng_state()
    first = kernel_distance(generated, real, subset_size=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert kernel_distance(generated, real, subset_size=50) == first
    assert kernel_distance(generated, real, subset_size=50, seed=1) != first
    assert first == pytest.approx(kernel_distance(generated, real), rel=0.2)
    whole = kernel_distance(generated, real, subset_size=200, num_subsets=3)
    assert whole == pytest.approx(kernel_distance(generated, real), rel=1e-9)


def test_cmmd_agrees_with_its_definition() -> None:
    generated, real = normal(6, 5, seed=1) * 3 + 1, normal(8, 5, seed=2)

    def mean(first: Tensor, second: Tensor) -> float:
        values = []
        for x in first:
            for y in second:
                apart = (x / x.norm() - y / y.norm()).square().sum().item()
                values.append(math.exp(-apart / (2 * 10**2)))
        return sum(values) / len(values)

    expected = 1000 * (mean(generated, generated) + mean(real, real) - 2 * mean(generated, real))
    assert cmmd(generated, real) == pytest.approx(expected, rel=1e-8)
    assert cmmd(5 * generated, real) == pytest.approx(expected, rel=1e-8)


def test_kernels_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = normal(20, 6, seed=1), normal(17, 6, seed=2)
    whole = kernel_distance(generated, real), cmmd(generated, real)
    monkeypatch.setattr("afa.metrics.distances._BLOCK", 3)
    assert (kernel_distance(generated, real), cmmd(generated, real)) == pytest.approx(whole)


def test_inception_score_of_extremes() -> None:
    assert inception_score(torch.zeros(12, 7)) == pytest.approx(1, abs=1e-12)
    sure = torch.full((12, 7), -1e4)
    sure[torch.arange(12), torch.arange(12) % 4] = 1e4
    assert inception_score(sure) == pytest.approx(4, abs=1e-9)
    assert inception_score(sure[:1].expand(5, -1)) == pytest.approx(1, abs=1e-9)


def test_inception_score_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = normal(50, 10) * 3
    with warnings.catch_warnings():
        # it says that it keeps all features, and takes the deviation of a single split
        warnings.simplefilter("ignore", UserWarning)
        metric = InceptionScore(feature=Stored(10), splits=1)
        metric.update(logits)
        expected, _ = metric.compute()
    assert inception_score(logits) == pytest.approx(expected.item(), rel=1e-9)


def test_cosines_are_of_partners() -> None:
    first = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    second = torch.tensor([[0.0, 2.0], [6.0, 8.0], [-2.0, -2.0]])
    assert cosine_scores(first, second) == pytest.approx([0, 1, -1], abs=1e-12)
    assert cosine_scores(first, second.roll(1, 0)) != pytest.approx([0, 1, -1], abs=0.1)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, cmmd])
def test_order_within_a_set_is_of_no_matter(measure: Callable[[Tensor, Tensor], float]) -> None:
    generated, real = normal(30, 8, seed=1) + 0.2, normal(25, 8, seed=2)
    expected = pytest.approx(measure(generated, real), rel=1e-9)
    assert measure(generated.flip(0), real.roll(7, 0)) == expected
    assert measure(real, generated) == expected


def test_pairs_may_be_reordered_together_but_not_alone() -> None:
    first, second = normal(10, 8, seed=1), normal(10, 8, seed=2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    scores = cosine_scores(first, second)
    moved = [scores[place] for place in order.tolist()]
    assert cosine_scores(first[order], second[order]) == pytest.approx(moved, abs=1e-12)
    assert cosine_scores(first[order], second) != pytest.approx(moved, abs=0.1)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, cmmd, cosine_scores])
def test_features_that_no_distance_is_of(measure: Callable[[Tensor, Tensor], float]) -> None:
    good, broken = normal(5, 4), normal(5, 4)
    broken[3, 2] = math.nan
    with refusal("AFA-METRIC-009", "3"):
        measure(good, broken)
    with refusal("AFA-METRIC-007", "4", "3"):
        measure(good, good[:, :3])
    with refusal("AFA-METRIC-008", r"\[4\]"):
        measure(good[0], good)
    with refusal("AFA-METRIC-008", r"\[0, 4\]"):
        measure(good[:0], good)


def test_what_single_metrics_refuse() -> None:
    good = normal(5, 4)
    for measure in (frechet_distance, kernel_distance):
        with refusal("AFA-METRIC-008", "2", r"\[1, 4\]"):
            measure(good, good[:1])
    for size in (1, 6):
        with refusal("AFA-METRIC-004", "2", "5", "100", f"{size}"):
            kernel_distance(good, good, subset_size=size)
    for pairwise in (cmmd, cosine_scores):
        with refusal("AFA-METRIC-006", "0"):
            pairwise(torch.zeros(5, 4), good)
    with refusal("AFA-METRIC-005", "5", "4"):
        cosine_scores(good, good[:4])
    with refusal("AFA-METRIC-009", "0"):
        inception_score(torch.full((2, 3), math.inf))
