"""Fusion rules without parameters: the mean, one expert only, and no fusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Mean(FusionRule):
    """The uniform mean of the experts' features: what an untrained SABW computes."""

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Average N features [B, C, H, W]; the weights are 1/N everywhere."""
        batch, _, height, width = features[0].shape
        share = features[0].new_full((batch, len(features), height, width), 1 / len(features))
        return Fused(weighted_sum(features, share), share)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Average the features that are there; there are no weights of all N."""
        return Fused(self.forward(list(features.values()), condition).feature)


class Only(FusionRule):
    """One expert's feature, the others' ignored: at every site, the same-shell control."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Pick the expert's feature out of N.

        Raises:
            AfaError: there is no such expert.
        """
        if not 0 <= self.expert < len(features):
            raise AfaError(
                f"Only({self.expert}) must name one of {len(features)} experts, "
                f"0 to {len(features) - 1}."
            )
        batch, _, height, width = features[0].shape
        share = features[0].new_zeros((batch, len(features), height, width))
        share[:, self.expert] = 1
        return Fused(features[self.expert], share)


class Separate(FusionRule):
    """No fusion: every expert goes on with its own feature."""

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Give each of the N features back to its own expert; there are no weights."""
        return Fused(list(features))
