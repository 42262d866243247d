"""Task arithmetic: add the weighted differences between experts and base to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from afa.merging.method import MergeMethod, check_weights, require_base, uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AddDifference(MergeMethod):
    """base + sum_n w_n (t_n - base): task arithmetic (Ilharco et al. 2023, arXiv 2212.04089).

    An equal weight of all experts is the paper's scaling coefficient. The web UIs' "add
    difference", A + w (B - C), has experts [A, B], base C and weights [1, w].

    Attributes:
        weights: one per expert, with any sum; None uses 1/N each, the mean of the experts.
    """

    weights: Sequence[float] | None = None
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=False)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Add the weighted differences of one tensor to the base."""
        base = require_base(base, self)
        total = base.clone()
        for tensor, weight in zip(tensors, uniform(self.weights, len(tensors)), strict=True):
            total += weight * (tensor - base)
        return total
