"""Fusion rules without parameters: the mean, a single expert, and no fusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.aggregators.rule import Condition, Fused, FusionRule, bias_at, shares_of, weighted_sum
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Mean(FusionRule):
    """The uniform mean of the experts' features, which an untrained SABW also computes.

    With a bias, the weights are its softmax over the experts.
    """

    can_steer = True

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Average N features [B, C, H, W]; without a bias, all weights are 1/N."""
        if condition.bias is not None:
            share = _softmax(condition.bias, features[0])
            return Fused(weighted_sum(features, share), share)
        batch, _, height, width = features[0].shape
        share = features[0].new_full((batch, len(features), height, width), 1 / len(features))
        return Fused(weighted_sum(features, share), share)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Average the features of some experts; the others have weight 0."""
        if condition.bias is not None:
            given, bias = list(features), condition.bias
            some = _softmax(bias[given] if bias.ndim == 1 else bias[:, given], features[given[0]])
            shares = shares_of(features, condition, {})
            if shares is not None:
                shares = shares.float()
                shares[:, given] = some
            return Fused(weighted_sum(list(features.values()), some), shares)
        fused = self.forward(list(features.values()), condition).feature
        equal = dict.fromkeys(features, 1 / len(features))
        return Fused(fused, shares_of(features, condition, equal))


def _softmax(bias: Tensor, feature: Tensor) -> Tensor:
    """The softmax over the experts of a bias, [B, N, H, W] in float32 at the feature's size."""
    batch, _, height, width = feature.shape
    weights = bias_at(bias, feature.float(), (height, width)).softmax(-3)
    return weights.expand(batch, -1, height, width)


class Only(FusionRule):
    """Use one expert's feature and ignore the others; at every site, this is the shell control."""

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Return the expert's feature, one of N features [B, C, H, W].

        Raises:
            AfaError: if there is no such expert.
        """
        if not 0 <= self.expert < len(features):
            raise AfaError(
                "AFA-FUSION-015",
                f"Only({self.expert}) names no expert of {len(features)}. Use a number from 0 to "
                f"{len(features) - 1}.",
            )
        batch, _, height, width = features[0].shape
        share = features[0].new_zeros((batch, len(features), height, width))
        share[:, self.expert] = 1
        return Fused(features[self.expert], share)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Return the expert's feature.

        Raises:
            AfaError: if the expert does not run.
        """
        if self.expert not in features:
            raise AfaError(
                "AFA-FUSION-016",
                f"Only({self.expert}) needs the features of that expert, but a schedule, a plan or "
                f"masking leaves only {sorted(features)}. Switch these off, or use another expert.",
            )
        shares = shares_of(features, condition, {self.expert: 1.0})
        return Fused(features[self.expert], shares)


class Separate(FusionRule):
    """No fusion: every expert continues with its own feature."""

    takes_some = True

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Return the N features unchanged; there are no weights."""
        return Fused(list(features))
