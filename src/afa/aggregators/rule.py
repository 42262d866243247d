"""What a fusion rule is: a module that makes one feature of N."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: answers to a timestep with the experts that run there, by number; the others are skipped
Schedule = Callable[[float], Sequence[int]]


class Condition(NamedTuple):
    """What a fusion rule may look at besides the features.

    `timestep` [B]; `temb` [B, T], mean of the experts' timestep embeddings; `text` [B, L, D], mean
    of their text embeddings (AFA, section 3.2), None where they take none; `sample`, the noisy
    latent as the experts take it, [B, C, H, W] or packed [B, T, C]; `text_mask` [B, L], true or 1
    where a token counts, None where all do; `bias` [N], what is added to the logits of the experts
    at this site, None where nothing is; `num_experts` N, None where nobody said it.
    """

    timestep: Tensor
    temb: Tensor
    text: Tensor | None
    sample: Tensor
    text_mask: Tensor | None = None
    bias: Tensor | None = None
    num_experts: int | None = None


class Fused(NamedTuple):
    """A rule's answer.

    `feature` [B, C, H, W] is what every expert goes on with; a sequence of N such tensors gives
    each expert its own. `weights` [B, N, H, W] sum to 1 over the experts; None where none exist.
    """

    feature: Tensor | Sequence[Tensor]
    weights: Tensor | None = None


class FusionRule(nn.Module, ABC):
    """Base of all fusion rules, one instance per site.

    A new way of combining experts is one subclass with one method.
    """

    #: whether `fuse_some` can do without some of the features
    can_prune = False
    #: whether weights are made of logits, to which a bias is added
    can_steer = False
    #: whether it computes in the type of its parameters, whatever that of the features is
    can_lower = False

    @property
    def takes_some(self) -> bool:
        """Whether it can do without the features of some experts: it has its own `fuse_some`."""
        return type(self).fuse_some is not FusionRule.fuse_some

    @abstractmethod
    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Make one feature, or one per expert, of N features [B, C, H, W]."""

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Make one feature of those of some experts.

        Args:
            features: [B, C, H, W] by the expert's number, of at least one.
            condition: of all experts.

        Returns: weights are [B, N, H, W] of all experts, 0 of those that are missing.

        Raises:
            AfaError: this rule needs all of them.
        """
        raise AfaError(
            "AFA-FUSION-008",
            f"{type(self).__name__} needs the features of all experts, but a schedule, a plan or "
            f"masking leaves only {sorted(features)}. Leave these out, or use Mean, Only or SABW.",
        )


def shares_of(
    features: Mapping[int, Tensor], condition: Condition, shares: Mapping[int, float]
) -> Tensor | None:
    """Fusion weights that are the same everywhere, 0 for experts that have none.

    Args:
        features: [B, C, H, W] by the expert's number.
        condition: says how many experts there are.
        shares: the weights, by the expert's number.

    Returns: [B, N, H, W]; None where the number of experts is not known.
    """
    if condition.num_experts is None:
        return None
    batch, _, height, width = (first := next(iter(features.values()))).shape
    weights = first.new_zeros((batch, condition.num_experts, height, width))
    for n, share in shares.items():
        weights[:, n] = share
    return weights


def weighted_sum(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of features times their weights (AFA, eq. 4), accumulated without stacking.

    Args:
        features: N tensors [B, C, H, W].
        weights: [B, N, H, W], cast to the features' dtype.

    Returns: [B, C, H, W] in the features' own dtype and memory format.
    """
    weights = weights.to(features[0].dtype)
    fused = features[0] * weights[:, :1]
    for n in range(1, len(features)):
        fused = torch.addcmul(fused, features[n], weights[:, n : n + 1])
    return fused
