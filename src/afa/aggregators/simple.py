"""Fusion rules without parameters: the mean, one expert only, and no fusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.aggregators.rule import Condition, Fused, FusionRule, shares_of, weighted_sum
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
        """Average the features of some experts; the others have the weight 0."""
        fused = self.forward(list(features.values()), condition).feature
        equal = dict.fromkeys(features, 1 / len(features))
        return Fused(fused, shares_of(features, condition, equal))


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
                "AFA-FUSION-015",
                f"Only({self.expert}) must name one of {len(features)} experts, "
                f"0 to {len(features) - 1}.",
            )
        batch, _, height, width = features[0].shape
        share = features[0].new_zeros((batch, len(features), height, width))
        share[:, self.expert] = 1
        return Fused(features[self.expert], share)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Pick the expert's feature out of those of some.

        Raises:
            AfaError: it is not among them.
        """
        if self.expert not in features:
            raise AfaError(
                "AFA-FUSION-016",
                f"Only({self.expert}) needs the features of that expert, but a schedule, a plan or "
                f"masking leaves only {sorted(features)}. Leave these out, or name another expert.",
            )
        shares = shares_of(features, condition, {self.expert: 1.0})
        return Fused(features[self.expert], shares)


class Separate(FusionRule):
    """No fusion: every expert continues with its own feature, whichever run."""

    takes_some = True

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Give each of the N features back to its own expert; there are no weights."""
        return Fused(list(features))
