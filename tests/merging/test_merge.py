"""Weighted merging against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afa.merging import AddDifference, WeightedSum
from afa.merging.in_memory import merge_models, weighted_merge
from tests.refusal import refusal


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return layer


A = [[1.0, 2.0], [3.0, 4.0]]
B = [[5.0, -2.0], [1.0, 0.0]]


def test_uniform() -> None:
    merged = weighted_merge([linear(A), linear(B)])
    assert merged.weight.tolist() == [[3.0, 0.0], [2.0, 2.0]]


def test_weighted() -> None:
    merged = weighted_merge([linear(A), linear(B)], [0.25, 0.75])
    assert merged.weight.tolist() == [[4.0, -1.0], [1.5, 1.0]]


def test_the_models_are_not_changed() -> None:
    models = [linear(A), linear(B)]
    weighted_merge(models)
    assert [m.weight.tolist() for m in models] == [A, B]


def test_sums_run_in_float32() -> None:
    # in bfloat16 256 + 1 is 256, and the mean of three would be wrong
    models = [linear([[v, v], [v, v]]).bfloat16() for v in (256.0, 1.0, 1.0)]
    merged = weighted_merge(models)
    assert merged.weight.dtype == torch.bfloat16
    assert merged.weight[0, 0].item() == torch.tensor(86.0).bfloat16().item()


def test_integers_are_the_first_models() -> None:
    models = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    models[0].load_state_dict({**models[0].state_dict(), "num_batches_tracked": torch.tensor(7)})
    assert weighted_merge(models).state_dict()["num_batches_tracked"].item() == 7


@pytest.mark.parametrize(
    ("models", "weights", "code", "value"),
    [
        ([], None, "AFA-MERGE-011", ""),
        ([linear(A)], [0.5, 0.5], "AFA-MERGE-017", r"\[0.5, 0.5\]"),
        ([linear(A), linear(B)], [0.5, 0.6], "AFA-MERGE-016", r"\[0.5, 0.6\]"),
        ([linear(A), nn.Linear(2, 3, bias=False)], None, "AFA-MERGE-013", "'weight'"),
        ([linear(A), nn.ReLU()], None, "AFA-MERGE-013", "'weight'"),
    ],
)
def test_what_does_not_fit(
    models: list[nn.Module], weights: list[float], code: str, value: str
) -> None:
    with refusal(code, value):
        weighted_merge(models, weights)


def test_a_base_is_asked_for_and_not_ignored() -> None:
    models = [linear(A), linear(B)]
    merged = merge_models(models, AddDifference([1.0, 1.0]), base=linear([[1.0, 1.0], [1.0, 1.0]]))
    assert merged.weight.tolist() == [[5.0, -1.0], [3.0, 3.0]]
    with refusal("AFA-MERGE-019"):
        merge_models(models, AddDifference())
    with refusal("AFA-MERGE-012"):
        merge_models(models, WeightedSum(), base=models[0])


def test_what_overflows_is_not_left_silently() -> None:
    models = [linear([[6e4, 0], [0, 0]]).half(), linear([[0, 0], [0, 0]]).half()]
    with refusal("AFA-MERGE-014", "'weight'", "torch.float16"):
        weighted_merge(models, [2, -1])
