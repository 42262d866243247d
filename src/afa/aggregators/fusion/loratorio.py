"""LoRAtorio: weights by how far each expert's prediction is from the base's."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field
from torch.nn import functional as F

from afa.aggregators import Condition, Fused, FusionRule, Separate
from afa.aggregators.fusion.recipe import FusionRecipe
from afa.aggregators.rule import has_both_halves, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from afa.denoisers import Site


class LoRAtorio(FusionRule):
    """Weights per patch by the distance from the base (Foteinopoulou et al., 2025).

    arXiv 2508.11624, for complete experts instead of LoRAs: where an expert knows nothing of the
    prompt, it predicts as its base does. In each patch, the weights of the experts are the softmax
    of their cosine distances from the base, by the temperature. In the unconditional half of
    guidance, the base predicts alone, or the experts are fused there, too.

    The distance is that of the predictions as they are: of noise, of velocity or of flow.

    Args:
        temperature: the smaller, the more of the farthest expert.
        patch: side of a patch in pixels of the latent.
        null: who predicts without prompt.
    """

    #: of the distances: with 1 the farthest expert has the largest weight, with -1 the nearest
    sign: ClassVar[int] = 1

    def __init__(
        self,
        temperature: float = 0.1,
        patch: int = 2,
        null: Literal["base", "experts"] = "base",
    ) -> None:
        super().__init__()
        self.temperature, self.patch, self.null = temperature, patch, null

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Fuse N experts and, last, their base.

        Args:
            features: N + 1 predictions [B, C, H, W].
            condition: the noisy latents show whether one half has no prompt.

        Returns: the prediction, and the weights [B, N + 1, H, W].
        """
        base = features[-1].float()
        size = base.shape[-2:]
        weights = torch.stack(
            [_distance(each.float(), base, self.patch) for each in features[:-1]], dim=1
        )
        weights = (self.sign * weights / self.temperature).softmax(1)  # [B, N, h, w]
        weights = F.interpolate(weights, scale_factor=self.patch, mode="nearest")
        weights = weights[..., : size[0], : size[1]]
        weights = torch.cat([weights, torch.zeros_like(weights[:, :1])], dim=1)
        if self.null == "base" and has_both_halves(condition.sample):
            half = len(base) // 2
            null = slice(half, None) if condition.prompt_first else slice(half)
            weights[null], weights[null, -1] = 0, 1
        return Fused(weighted_sum(features, weights), weights)


def _distance(prediction: Tensor, base: Tensor, patch: int) -> Tensor:
    """The cosine distance [B, h, w] of patches of two predictions [B, C, H, W]."""

    def pooled(product: Tensor) -> Tensor:
        # sums over the patch, whose last row or column may be smaller
        summed = product.sum(1, keepdim=True)
        return F.avg_pool2d(summed, patch, ceil_mode=True, count_include_pad=False)[:, 0]

    norms = (pooled(prediction.square()) * pooled(base.square())).sqrt()
    return 1 - pooled(prediction * base) / norms.clamp(min=1e-12)


class ByDistance(BaseModel):
    """The settings of a rule with weights by the distance from the base, at the last site only."""

    with_base: ClassVar[bool] = True

    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    patch: int = Field(default=2, ge=1, le=64)
    null: Literal["base", "experts"] = "base"

    @property
    def needs_halves(self) -> bool:
        """Whether the base predicts without prompt."""
        return self.null == "base"

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """The rule at the last site only."""
        return [*(Separate() for _ in sites[:-1]), self.rule_of_predictions()]

    @abstractmethod
    def rule_of_predictions(self) -> FusionRule:
        """The rule with these settings."""

    @classmethod
    def grid(cls, temperatures: Sequence[float]) -> list[Self]:
        """All candidates with some temperatures."""
        nulls: tuple[Literal["base", "experts"], ...] = ("base", "experts")
        grid = itertools.product(temperatures, (1, 2, 4), nulls)
        return [cls(temperature=t, patch=p, null=n) for t, p, n in grid]


class LoRAtorioRecipe(ByDistance, FusionRecipe):
    """`rule: loratorio`; see `LoRAtorio` for its settings. It needs `base` in the recipe."""

    rule: Literal["loratorio"] = "loratorio"

    def rule_of_predictions(self) -> LoRAtorio:
        """See `ByDistance.rule_of_predictions`."""
        return LoRAtorio(self.temperature, self.patch, self.null)

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row; temperature, patch and the unconditional half are chosen."""
        return {"LoRAtorio": cls.grid((0.003, 0.01, 0.03, 0.1, 0.3))}
