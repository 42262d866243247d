"""`FusionRule`, the base of modules that fuse N features into one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: a function from a timestep to the numbers of the experts that run; the others are skipped
Schedule = Callable[[float], Sequence[int]]


class Condition(NamedTuple):
    """The inputs of a fusion rule besides the features.

    Attributes:
        timestep: [B].
        temb: the mean of the experts' timestep embeddings, [B, T].
        text: the mean of the experts' text embeddings (AFA, section 3.2), [B, L, D]; None without
            text.
        sample: the noisy latent as the experts receive it, [B, C, H, W] or packed [B, T, C].
        text_mask: [B, L], true or 1 for tokens that count; None if all tokens count.
        bias: added to the experts' logits at this site: [N], or [B, N, h, w] by region of the
            picture; None for no bias. See `bias_at`.
        num_experts: N; None if unknown.
        prompt_first: whether the first half of a batch with both halves of guidance is the one with
            the prompt; see `has_both_halves`.
    """

    timestep: Tensor
    temb: Tensor
    text: Tensor | None
    sample: Tensor
    text_mask: Tensor | None = None
    bias: Tensor | None = None
    num_experts: int | None = None
    prompt_first: bool = False


class Fused(NamedTuple):
    """The output of a fusion rule.

    Attributes:
        feature: the fused feature [B, C, H, W], with which all experts continue; or a sequence of N
            such tensors, one for each expert.
        weights: the fusion weights [B, N, H, W], which sum to 1 over the experts; None for rules
            without weights.
    """

    feature: Tensor | Sequence[Tensor]
    weights: Tensor | None = None


class FusionRule(nn.Module, ABC):
    """Base class of all fusion rules, with one instance per site.

    To add a rule, write a subclass with the method `forward`.
    """

    #: whether a pruning plan may skip experts; then `fuse_some` must be implemented
    can_prune = False
    #: whether weights are a softmax of logits to which the rule adds `condition.bias`
    can_steer = False
    #: whether it computes in the data type of its parameters, whatever the features' type
    can_lower = False

    @property
    def takes_some(self) -> bool:
        """Whether it can fuse only some of the experts, that is, it overrides `fuse_some`."""
        return type(self).fuse_some is not FusionRule.fuse_some

    @abstractmethod
    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Fuse N features [B, C, H, W] into one, or into one per expert.

        Args:
            features: the features of the experts that run, in order.
            condition: the timestep, text and latent.
        """

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Fuse the features of some experts.

        Args:
            features: the features [B, C, H, W] by expert number, at least one.
            condition: the timestep, text and latent.

        Returns: the fused feature and the weights [B, N, H, W] of all experts, which are 0 for
            experts without a feature.

        Raises:
            AfaError: if this rule needs the features of all experts.
        """
        raise AfaError(
            "AFA-FUSION-008",
            f"{type(self).__name__} needs the features of all experts, but a schedule, a plan or "
            f"masking leaves only {sorted(features)}. Switch these off, or use Mean, Only or SABW.",
        )


def has_both_halves(sample: Tensor) -> bool:
    """Whether a batch has every latent twice, as in guidance: without and with prompt."""
    half = len(sample) // 2
    return len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])


def bias_at(bias: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a bias of `Condition` so that it can be added to logits.

    Args:
        bias: [N], or [B, N, h, w], which is averaged or interpolated to the size.
        logits: [B, N, ...], for the data type and the device.
        size: height and width [H, W] of the feature.

    Returns: [N, 1, 1] or [B, N, H, W].
    """
    bias = bias.to(logits)
    if bias.ndim == 1:
        return bias[:, None, None]
    if any(own > asked for own, asked in zip(bias.shape[-2:], size, strict=True)):
        return F.adaptive_avg_pool2d(bias, size)
    return F.interpolate(bias, size, mode="bilinear", align_corners=False)


def shares_of(
    features: Mapping[int, Tensor], condition: Condition, shares: Mapping[int, float]
) -> Tensor | None:
    """Make fusion weights that are constant over pixels, and 0 for experts without a share.

    Args:
        features: the features [B, C, H, W] by expert number, for the shape.
        condition: has the number of experts.
        shares: the weights by expert number.

    Returns: [B, N, H, W]; None if the number of experts is unknown.
    """
    if condition.num_experts is None:
        return None
    batch, _, height, width = (first := next(iter(features.values()))).shape
    weights = first.new_zeros((batch, condition.num_experts, height, width))
    for n, share in shares.items():
        weights[:, n] = share
    return weights


def weighted_sum(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum the features times their weights (AFA, eq. 4), without stacking them.

    Args:
        features: N tensors [B, C, H, W].
        weights: [B, N, H, W]; cast to the features' data type.

    Returns: [B, C, H, W], in the features' data type and memory format.
    """
    weights = weights.to(features[0].dtype)
    fused = features[0] * weights[:, :1]
    for n in range(1, len(features)):
        fused = torch.addcmul(fused, features[n], weights[:, n : n + 1])
    return fused
