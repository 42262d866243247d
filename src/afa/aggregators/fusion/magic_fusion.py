"""MagicFusion: at every pixel, use the expert with the most salient guidance response."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, PositiveFloat
from torch.nn import functional as F

from afa.aggregators import Condition, Fused, FusionRule, Separate
from afa.aggregators.fusion.recipe import FusionRecipe
from afa.aggregators.rule import has_both_halves
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from afa.denoisers import Site


class MagicFusion(FusionRule):
    """Saliency-aware noise fusion (Zhao et al., ICCV 2023, arXiv 2303.13126), for N experts.

    The saliency of expert n is its guidance response |eps_n(c) - eps_n(null)|, smoothed, averaged
    over the channels and normalised by a softmax over the pixels. Every pixel uses the prediction
    of the expert with the largest saliency, for both halves of guidance, so that guidance gives the
    same result as if it had been applied before fusion. For two experts this is the paper's rule;
    the published code measures both responses from the first expert's null prediction instead.

    With v-prediction the response differs from that of noise prediction by a factor that depends
    only on the timestep; it changes the sharpness of the softmax like a temperature.

    Args:
        temperatures: one per expert, or one for all; factors of the saliency before the softmax
            (the paper's k; larger is sharper).
        fuse_below: from this timestep on (more noise), only the first expert is used. By default
            all timesteps are fused. Flow models start at timestep 1000.

    Raises:
        AfaError: if a temperature is not positive.
    """

    def __init__(
        self, temperatures: float | Sequence[float] = 1.0, fuse_below: float = math.inf
    ) -> None:
        super().__init__()
        listed = [temperatures] if isinstance(temperatures, (int, float)) else list(temperatures)
        if not listed or min(listed) <= 0:
            raise AfaError(
                "AFA-FUSION-004", f"MagicFusion's temperatures must be positive; got {listed}."
            )
        self.temperatures = listed
        self.fuse_below = fuse_below

    def saliency(self, prediction: Tensor, temperature: float) -> Tensor:
        """The normalised saliency [B, 1, H, W] of an expert's predictions [2 B, C, H, W]."""
        null, prompted = prediction.float().chunk(2)
        response = (prompted - null).abs()
        # a window of 4, as published: the result is one pixel smaller, and resized
        smooth = F.avg_pool2d(response, 4, stride=1, padding=1)
        smooth = F.interpolate(smooth, size=response.shape[-2:], mode="bilinear")
        smooth = smooth.mean(1, keepdim=True)
        return (temperature * smooth.flatten(1)).softmax(1).view_as(smooth)

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Select one of N predictions [2 B, C, H, W] at every pixel.

        Args:
            features: the experts' predictions, with both halves of guidance in one batch.
            condition: the noisy latents show whether both halves are there.

        Raises:
            AfaError: if the batch does not contain every latent twice (guidance is off), if the
                number of temperatures is neither 1 nor N, or if the predictions are too small.
        """
        if not has_both_halves(condition.sample):
            raise AfaError(
                "AFA-FUSION-007",
                "MagicFusion needs classifier-free guidance with both halves in one batch. Set a "
                "guidance scale above 1.",
            )
        count = len(features)
        temperatures = self.temperatures * (count if len(self.temperatures) == 1 else 1)
        if len(temperatures) != count:
            raise AfaError(
                "AFA-FUSION-005",
                f"MagicFusion needs one temperature, or one for each of the {count} experts; got "
                f"{len(temperatures)}.",
            )
        if features[0].shape[-1] < 2 or features[0].shape[-2] < 2:
            raise AfaError(
                "AFA-FUSION-006",
                "MagicFusion needs predictions of at least 2x2 pixels; got "
                f"{tuple(features[0].shape[-2:])}. Draw larger pictures.",
            )
        maps = [self.saliency(f, k) for f, k in zip(features, temperatures, strict=True)]
        chosen = torch.cat(maps, dim=1).argmax(1)  # [B, H, W]
        is_early = condition.timestep[: len(chosen)] >= self.fuse_below
        chosen = torch.where(is_early[:, None, None], 0, chosen).repeat(2, 1, 1)
        weights = F.one_hot(chosen, count).permute(0, 3, 1, 2).to(features[0].dtype)
        stacked = torch.stack(list(features))  # [N, 2 B, C, H, W]
        index = chosen[None, :, None].expand(1, *features[0].shape)
        return Fused(stacked.gather(0, index)[0], weights)


def magic_fusion(
    sites: Sequence[Site],
    temperatures: float | Sequence[float] = 1.0,
    fuse_below: float = math.inf,
) -> list[FusionRule]:
    """The rules of an ensemble that fuses only the predictions, with `MagicFusion`."""
    return [*(Separate() for _ in sites[:-1]), MagicFusion(temperatures, fuse_below)]


class MagicFusionRecipe(FusionRecipe):
    """`rule: magic_fusion`; see `MagicFusion` for its settings, which have its defaults."""

    rule: Literal["magic_fusion"] = "magic_fusion"
    temperatures: list[PositiveFloat] | None = Field(default=None, min_length=1)
    fuse_below: PositiveFloat | None = None

    @property
    def needs_halves(self) -> bool:
        """Always: it compares them."""
        return True

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """`MagicFusion` at the last site only."""
        return magic_fusion(sites, **self.model_dump(exclude={"rule"}, exclude_none=True))

    def check(self, num_experts: int, guidance: float) -> None:
        """Refuse a comparison without guidance, and a wrong number of temperatures."""
        if guidance <= 1:
            raise ValueError("must have a guidance above 1")
        if len(self.temperatures or [1.0]) not in (1, num_experts):
            raise ValueError(
                f"must have one temperature, or one for each of {num_experts} experts; got "
                f"{self.temperatures}"
            )

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row; the temperature is chosen, and a larger one makes the saliency sharper."""
        return {"MagicFusion": [cls(temperatures=[t]) for t in (1.0, 10.0, 100.0, 1000.0)]}
