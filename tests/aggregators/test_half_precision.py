"""Means in float16: right where their sums overflow, and bit for bit what they were elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from afa.aggregators import SABW, Condition, Mean, weighted_sum
from afa.aggregators.fusion import MagicFusion
from afa.aggregators.sabw import pooled
from afa.denoisers.prompt import average, mean_of
from tests.aggregators.test_sabw import CONFIG

LARGEST = torch.finfo(torch.float16).max


_CONDITION = Condition(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1))


def plain_halved(feature: torch.Tensor) -> torch.Tensor:
    """As it was before it minded overflows."""
    rows = feature[..., ::2, :] + feature[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def of_every_size(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers of all magnitudes down to subnormal ones, none of which overflow in a sum."""
    size = torch.empty(shape).uniform_(-26, 13)
    return (torch.randn(shape) * 2**size).clamp(-16000, 16000).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_was_finite_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    feature = of_every_size(dtype, 2, 8, 32, 32)
    assert torch.equal(pooled(feature, 2), plain_halved(feature))
    four = [of_every_size(dtype, 4, 64, 64) for _ in range(4)]
    assert torch.equal(average(four), sum(four[1:], start=four[0]) / 4)
    if dtype == torch.float16:  # finite beside what is not
        mixed = feature.clone()
        mixed[..., :4, :4] = 60000
        before, after = plain_halved(mixed), pooled(mixed, 2)
        assert before.isinf().any()
        assert after.isfinite().all()
        assert torch.equal(after[before.isfinite()], before[before.isfinite()])


@pytest.mark.parametrize("value", [20000.0, -40000.0, LARGEST, -LARGEST])
def test_pooling_does_not_overflow(value: float) -> None:
    feature = torch.full((1, 2, 12, 12), value, dtype=torch.float16)
    for pool in (2, 3, 4, 6, 8):
        assert (pooled(feature, pool) == value).all(), pool
    signs = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float16) * abs(value)
    assert pooled(signs[None, None], 2).item() == 0


def test_pooling_is_the_mean_of_large_numbers() -> None:
    feature = torch.empty(2, 4, 16, 16).uniform_(-LARGEST, LARGEST).half()
    torch.testing.assert_close(
        pooled(feature, 2).float(), avg_pool2d(feature.float(), 2), rtol=1e-3, atol=32
    )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    feature = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    feature[..., 0, 0] = value
    halved = pooled(feature, 2)
    assert not halved[0, 0, 0, 0].isfinite()
    assert not halved[0, 0, 1:].any()
    mean = average([feature, torch.zeros_like(feature)])
    assert not mean[0, 0, 0, 0].isfinite()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_mean_of_experts_does_not_overflow(count: int) -> None:
    for value in (30000.0, LARGEST):
        same = [torch.full((2, 3), value, dtype=torch.float16) for _ in range(count)]
        assert (average(same) == value).all()
        assert (mean_of(same) == value).all()
    assert mean_of([same[0]] * 3) is same[0]


def test_a_missing_expert_stands_for_a_mean_that_does_not_overflow() -> None:
    sabw = SABW(CONFIG).half()
    features = {n: torch.full((1, 6, 4, 4), 49984.0, dtype=torch.float16) for n in (0, 2)}
    seen: list[torch.Tensor] = []

    def weights(completed: Any, *_: Any) -> torch.Tensor:
        seen.extend(completed)
        return torch.full((1, 3, 4, 4), 1 / 3)

    sabw.fusion_weights = weights  # type: ignore[method-assign,assignment]
    sabw.fuse_some(features, _CONDITION)
    assert [float(feature.mean()) for feature in seen] == [49984.0] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_weighted_sums_of_large_numbers(count: int) -> None:
    """Up to a thousandth below the largest number: there the rounding of weights comes in."""
    top = LARGEST * (1 - 2**-9)
    features = [torch.empty(2, 3, 8, 8).uniform_(-top, top).half() for _ in range(count)]
    features[0][0] = features[-1][0] = torch.tensor(top).half()
    exact = torch.stack(features).float()
    for share in (torch.randn(2, count, 8, 8) * 4, torch.zeros(2, count, 8, 8)):
        weights = share.softmax(1)
        fused = weighted_sum(features, weights)
        expected = (exact * weights.transpose(0, 1)[:, :, None]).sum(0)
        torch.testing.assert_close(fused.float(), expected, rtol=2e-3, atol=128)
    fused_mean = Mean()(features, _CONDITION).feature
    assert isinstance(fused_mean, torch.Tensor)
    torch.testing.assert_close(fused_mean.float(), exact.mean(0), rtol=2e-3, atol=128)


def test_magic_fusion_of_large_numbers() -> None:
    latent = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    condition = Condition(torch.full((2,), 500.0), torch.zeros(2, 3), None, latent)
    experts = [torch.full((2, 4, 8, 8), 40000.0, dtype=torch.float16) for _ in range(2)]
    experts[0][0], experts[1][0, :, 4:] = -60000.0, -60000.0
    rule = MagicFusion(1e-4)
    assert rule.saliency(experts[0], 1e-4).isfinite().all()
    fused, weights = rule(experts, condition)
    assert isinstance(fused, torch.Tensor)
    assert weights is not None
    assert fused.isfinite().all()
    assert (weights.sum(1) == 1).all()
