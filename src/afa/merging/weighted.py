"""The weighted mean of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.merging.method import MergeMethod, check_weights, uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightedSum(MergeMethod):
    """sum_n w_n t_n: weighted merging, or a model soup (Wortsman et al. 2022, arXiv 2203.05482).

    Attributes:
        weights: one per expert, summing to 1; None is uniform. Negative ones extrapolate.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=True)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """The weighted mean of one tensor."""
        return weighted_sum(tensors, uniform(self.weights, len(tensors)))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_n w_n t_n, with memory for two tensors more.

    A tensor of weight 0 is left out, so that the other's zeros keep their sign: an expert of weight
    1 comes out bit for bit.
    """
    counted = [pair for pair in zip(tensors, weights, strict=True) if pair[1] != 0]
    if not counted:
        return torch.zeros_like(tensors[0])
    first, *others = counted
    total = first[1] * first[0]
    for tensor, weight in others:
        total += weight * tensor
    return total
