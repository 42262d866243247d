"""Sparse fusion: at each pixel, only the experts with the largest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Leading(FusionRule):
    """Of another rule's weights, keep the largest ones at each pixel, scaled to sum to 1.

    Top-k routing, as in mixtures of experts (Shazeer et al., 2017). All experts still run.

    Args:
        rule: the other rule; without weights it is not changed.
        count: number of experts that keep a weight.

    Raises:
        AfaError: if no expert would be left.
    """

    def __init__(self, rule: FusionRule, count: int) -> None:
        super().__init__()
        if count < 1:
            raise AfaError(
                "AFA-FUSION-017", f"At least one expert must keep a weight; got {count}."
            )
        self.rule, self.count = rule, count
        self.can_steer, self.can_lower = rule.can_steer, rule.can_lower

    @property
    def takes_some(self) -> bool:
        """Whether the other rule can fuse only some of the experts."""
        return self.rule.takes_some

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Fuse N features [B, C, H, W] with the other rule's largest weights."""
        return self._sparse(dict(enumerate(features)), self.rule(features, condition))

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Fuse the features of some experts with the largest of their weights."""
        return self._sparse(features, self.rule.fuse_some(features, condition))

    def _sparse(self, features: Mapping[int, Tensor], fused: Fused) -> Fused:
        if fused.weights is None or len(features) <= self.count:
            return fused
        kept = fused.weights.topk(self.count, dim=1).indices
        weights = fused.weights * torch.zeros_like(fused.weights).scatter_(1, kept, 1)
        weights = weights / weights.sum(1, keepdim=True)
        given = list(features)
        return Fused(weighted_sum(list(features.values()), weights[:, given]), weights)
