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
        weights: one per expert, summing to 1; None uses 1/N each. Negative weights extrapolate.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=True)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Compute the weighted mean of one tensor."""
        return weighted_sum(tensors, uniform(self.weights, len(tensors)))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Compute sum_n w_n t_n, with memory for two more tensors.

    Skips tensors of weight 0, so that zeros keep their sign and an expert of weight 1 is returned
    bit for bit.
    """
    counted = [pair for pair in zip(tensors, weights, strict=True) if pair[1] != 0]
    if not counted:
        return torch.zeros_like(tensors[0])
    first, *others = counted
    total = first[1] * first[0]
    for tensor, weight in others:
        total += weight * tensor
    return total
