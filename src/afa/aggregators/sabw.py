"""SABW, the spatial-aware block-wise aggregator: the trained part of AFA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from pydantic import Field
from torch import nn

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.denoisers.prompt import average, once_per_prompt
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_SITE_FIELDS = ("num_experts", "in_channels", "temb_channels", "text_channels")


#: a number of things of which there is at least one
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SABWSettings:
    """What a user chooses of an aggregator, one choice for all sites.

    Recipes and `config.json` of ensemble folders have these keys. Defaults are the paper's (AFA,
    section 4.1) but for `hidden_ratio` and `min_scale`, which are None and 1 there: the paper's
    aggregator costs the same at every width of the experts, more than they do where they are
    narrow; this one follows them, and on the emoji scenes its pictures were not told apart from
    those of the paper's (docs/benchmarks.md). With `sites="conv_out"` they were worse, so set both
    back there. The switches take away one of the states that the weights depend on (AFA, section
    4.4, ablations).

    Attributes:
        hidden_size: channels inside, the same at all sites where `hidden_ratio` is None.
        num_layers: transformer blocks; 2 is what the published code runs although it says 1.
        num_heads: of attention at the full `hidden_size`; a smaller site has fewer, as wide.
        norm_num_groups: likewise.
        spatial: off, one weight per expert and site, the same at all pixels.
        timestep: off, the weights do not see the denoising step.
        prompt: off, the weights do not see the prompt.
        sharing: `width`, sites of as many channels whose weights are on one grid share one
            aggregator.
        sites: `conv_out`, only the predictions are fused.
        stride: a site after every so many blocks; the first and the last site always are.
        hidden_ratio: channels inside by those of the experts at a site, `hidden_size` at the most.
            At the last site the experts' width is that of the first.
        min_scale: weights are found on a grid this many times smaller than the latent, per side,
            and interpolated; sites whose features are as small see them as they are.

    Raises AfaError: sizes that do not fit each other.
    """

    hidden_size: Count = 128
    num_layers: Count = 2
    num_heads: Count = 8
    norm_num_groups: Count = 32
    spatial: bool = True
    timestep: bool = True
    prompt: bool = True
    sharing: Literal["none", "width"] = "none"
    sites: Literal["all", "conv_out"] = "all"
    stride: Count = 1
    hidden_ratio: Annotated[float, Field(gt=0)] | None = 1.0
    min_scale: Count = 2

    def __post_init__(self) -> None:
        for name, written in SABWSettings.__annotations__.items():
            if written == "Count" and getattr(self, name) < 1:
                raise AfaError(
                    "AFA-FUSION-009",
                    f"aggregator.{name} must be at least 1, came {getattr(self, name)}.",
                )
        if self.hidden_ratio is not None and not self.hidden_ratio > 0:
            raise AfaError(
                "AFA-FUSION-010",
                f"aggregator.hidden_ratio must be above 0, came {self.hidden_ratio}.",
            )
        if self.hidden_size % self.num_heads:
            raise AfaError(
                "AFA-FUSION-011",
                f"aggregator.hidden_size must be a multiple of num_heads, came {self.hidden_size} "
                f"and {self.num_heads}. Change one of them.",
            )
        if self.hidden_size % self.norm_num_groups or self.hidden_size == self.norm_num_groups:
            # with one channel a group, group norm cancels what the timestep adds to that channel
            quarter = max(1, self.hidden_size // 4)
            fitting = max(g for g in range(1, quarter + 1) if self.hidden_size % g == 0)
            raise AfaError(
                "AFA-FUSION-012",
                "aggregator.hidden_size must be a multiple of norm_num_groups, at least twice it, "
                f"came {self.hidden_size} and {self.norm_num_groups}. Choose norm_num_groups = "
                f"{fitting} or a larger hidden_size.",
            )


@dataclass(frozen=True)
class SABWConfig(SABWSettings):
    """Shape of an aggregator: the user's settings, and the properties of its site.

    `EnsembleDenoiser` fills in the properties of the site; leave them out.

    Attributes:
        num_experts: that are fused.
        in_channels: of their features at the site.
        temb_channels: width of the embedded timestep.
        text_channels: width of the embedding of a token.
        width: channels that `hidden_ratio` goes by.
        pool: how many times smaller the grid of the weights is than the features, per side.

    Raises AfaError: sizes that do not fit each other.
    """

    num_experts: int | None = None
    in_channels: int | None = None
    temb_channels: int | None = None
    text_channels: int | None = None
    width: int | None = None
    pool: int = 1

    @property
    def channels(self) -> int:
        """Hidden channels at this site: a whole number of heads and of groups."""
        if self.hidden_ratio is None or self.width is None:
            return self.hidden_size
        unit = math.lcm(self.hidden_size // self.num_heads, 2 * self._group_size)
        asked = unit * max(1, round(self.hidden_ratio * self.width / unit))
        return min(asked, self.hidden_size)

    @property
    def heads(self) -> int:
        """Attention heads at this site, each as wide as at any other."""
        return self.channels // (self.hidden_size // self.num_heads)

    @property
    def groups(self) -> int:
        """Groups of the norms at this site, each as large as at any other."""
        return self.channels // self._group_size

    @property
    def _group_size(self) -> int:
        return self.hidden_size // self.norm_num_groups


class _Mix(nn.Conv2d):
    """A 1x1 convolution of N features side by side, added up without concatenating them."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Mix N features [B, C, H, W] to [B, C', H, W]."""
        batch, _, height, width = features[0].shape
        kernels = self.weight.flatten(1).chunk(len(features), dim=1)
        assert self.bias is not None, "it is built with one"
        hidden = self.bias[:, None].expand(batch, -1, height * width)
        for feature, kernel in zip(features, kernels, strict=True):
            hidden = torch.baddbmm(hidden, kernel.expand(batch, -1, -1), feature.flatten(2))
        return hidden.unflatten(2, (height, width))


def _halved(feature: Tensor) -> Tensor:
    """The mean of two by two pixels; on a processor five times as fast as `avg_pool2d`."""
    rows = feature[..., ::2, :] + feature[..., 1::2, :]
    mean = (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
    if mean.dtype != torch.float16:
        return mean
    # the sum of four may overflow where their mean does not; quarters of tiny numbers lose bits, so
    # they are taken only there, without a branch on values for which a GPU would be waited for
    quarter = feature * 0.25
    rows = quarter[..., ::2, :] + quarter[..., 1::2, :]
    return torch.where(mean.isfinite(), mean, rows[..., ::2] + rows[..., 1::2])


class SABW(FusionRule):
    """Per-pixel softmax weights over the experts, from features, timestep and prompt.

    AFA, section 3.2: a 1x1 convolution of the concatenated features, a ResNet block conditioned on
    the timestep, a 2-D transformer that attends to the prompt, and a 1x1 convolution to one logit
    per expert. That last one starts at zero, so the untrained ensemble is the uniform mean.
    Parameter names are those of the published code.

    Args:
        config: with all of a site's properties filled in.

    Raises:
        AfaError: a property of the site is missing.
    """

    can_prune = True
    can_steer = True
    can_lower = True

    def __init__(self, config: SABWConfig) -> None:
        super().__init__()
        sizes = [getattr(config, name) for name in _SITE_FIELDS]
        missing = [
            name
            for name, size in zip(_SITE_FIELDS, sizes, strict=True)
            if size is None and (config.prompt or name != "text_channels")
        ]
        if missing:
            raise AfaError(
                "AFA-FUSION-013",
                f"SABW must know its site; the config lacks {', '.join(missing)}. Give them, or "
                "pass the config to EnsembleDenoiser, which fills them in.",
            )
        self.config = config
        num_experts, in_channels, temb_channels, text_channels = sizes
        hidden, groups = config.channels, config.groups
        self.conv_in = _Mix(num_experts * in_channels, hidden, 1)
        self.res_block = ResnetBlock2D(
            in_channels=hidden,
            temb_channels=temb_channels if config.timestep else None,
            groups=groups,
        )
        self.transformer = Transformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=hidden // config.heads,
            in_channels=hidden,
            num_layers=config.num_layers,
            cross_attention_dim=text_channels if config.prompt else None,
            norm_num_groups=groups,
        )
        self.conv_out = nn.Conv2d(hidden, num_experts, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def fusion_weights(
        self,
        features: Sequence[Tensor],
        condition: Condition,
        missing: Sequence[int] = (),
    ) -> Tensor:
        """Weights of the experts at every pixel (AFA, eq. 3).

        Args:
            features: N features [B, C, H, W] of the experts.
            condition: the mean timestep and text embedding.
            missing: experts that get no weight, by number.

        Returns: [B, N, H, W] in float32, summing to 1 over N.
        """
        dtype, size = self.conv_in.weight.dtype, features[0].shape[-2:]
        hidden = self.conv_in([self._pooled(feature).to(dtype) for feature in features])
        temb = condition.temb.to(dtype) if self.config.timestep else None
        hidden = self.res_block(hidden, temb)
        hidden = self.transformer(hidden, **self._prompt(condition), return_dict=False)[0]
        logits = self.conv_out(hidden).float()
        if not self.config.spatial:
            logits = logits.mean((2, 3), keepdim=True)
        elif self.config.pool > 1:
            logits = F.interpolate(logits, size, mode="bilinear")
        if condition.bias is not None:
            logits = logits + condition.bias.to(logits)[:, None, None]
        if missing:
            logits[:, missing] = -math.inf
        return logits.softmax(dim=1).expand(-1, -1, *size)

    def _pooled(self, feature: Tensor) -> Tensor:
        """A feature [B, C, H, W] on the grid where weights are found."""
        pool = self.config.pool
        while pool % 2 == 0 and feature.shape[-1] % 2 == 0 and feature.shape[-2] % 2 == 0:
            feature, pool = _halved(feature), pool // 2
        return feature if pool == 1 else F.avg_pool2d(feature, pool, ceil_mode=True)

    def _prompt(self, condition: Condition) -> dict[str, Tensor | None]:
        """What the transformer attends to."""
        if not self.config.prompt or condition.text is None:
            return {}
        given, dtype = condition.text, self.conv_in.weight.dtype
        text = given
        if given.dtype != dtype:
            text = once_per_prompt(given, dtype, lambda: given.to(dtype))
        return {"encoder_hidden_states": text, "encoder_attention_mask": condition.text_mask}

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Fuse the experts' features at one site with per-pixel weights (AFA, section 3.2).

        Args:
            features: N features [B, C, H, W] of the experts.
            condition: the mean timestep and text embedding.

        Returns: the fused feature, in the features' dtype, and the weights, in float32.

        Raises:
            AfaError: another number of features than the config's `num_experts`.
        """
        if len(features) != self.config.num_experts:
            raise AfaError(
                "AFA-FUSION-014",
                f"This aggregator fuses {self.config.num_experts} experts, came {len(features)} "
                "features. Use the experts it was trained with.",
            )
        weights = self.fusion_weights(features, condition)
        return Fused(weighted_sum(features, weights), weights)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Fuse the features of some experts with per-pixel weights that sum to 1 over these.

        To the aggregator, an expert that is missing has the mean feature of those that are not; a
        single one is not asked about.

        Args:
            features: [B, C, H, W] by the expert's number.
            condition: the mean timestep and text embedding of all experts.
        """
        count, given = self.config.num_experts or 0, list(features.values())
        first = given[0]
        if len(given) == 1:
            share = first.new_zeros((len(first), count, *first.shape[-2:]), dtype=torch.float32)
            share[:, next(iter(features))] = 1
            return Fused(first, share)
        stand_in = average(given)
        missing = [n for n in range(count) if n not in features]
        completed = [features.get(n, stand_in) for n in range(count)]
        weights = self.fusion_weights(completed, condition, missing)
        return Fused(weighted_sum(given, weights[:, list(features)]), weights)
