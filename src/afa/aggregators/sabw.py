"""SABW, the spatial-aware block-wise aggregator (AFA, section 3.2): the trained part of AFA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from pydantic import Field
from torch import nn

from afa.aggregators.rule import Condition, Fused, FusionRule, bias_at, weighted_sum
from afa.denoisers.prompt import average, once_per_prompt
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from torch import Tensor

_SITE_FIELDS = ("num_experts", "in_channels", "temb_channels", "text_channels")


#: a positive integer
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SABWSettings:
    """The settings of aggregators that a user chooses, the same for all sites.

    Recipes and `config.json` of ensemble folders have these keys. The defaults are the paper's
    (AFA, section 4.1), except `hidden_ratio` and `min_scale`, for which the paper's values are None
    and 1. The paper's aggregator has the same cost at every site, which exceeds that of experts
    where they are narrow. This one scales with the experts, and on the emoji scenes its pictures
    did not differ measurably (docs/benchmarks.md). With `sites="conv_out"` they were worse: set
    both to the paper's values there. `spatial`, `timestep` and `prompt` are the ablations of AFA,
    section 4.4.

    Attributes:
        hidden_size: hidden channels; the maximum if `hidden_ratio` is set.
        num_layers: transformer blocks. The published code runs 2, although it is configured with 1.
        num_heads: attention heads at the full `hidden_size`; smaller sites have fewer heads of the
            same width.
        norm_num_groups: groups of the group norms at the full `hidden_size`; likewise.
        spatial: off gives one weight per expert and site, the same at all pixels.
        timestep: off hides the timestep from the aggregator.
        prompt: off hides the prompt from the aggregator.
        sharing: `width` shares one aggregator between sites with equal channels and weight grids.
        sites: `conv_out` fuses only the predictions, as `all` does for some experts that predict
            different quantities; see `fuse` of `afa.load_pipeline`.
        stride: fuse at every `stride`-th site; the first and the last are always fused.
        hidden_ratio: hidden channels divided by the experts' channels at the site, limited by
            `hidden_size`; at the last site the channels of the first site count. None uses
            `hidden_size` at all sites.
        min_scale: compute weights on a grid this many times smaller than the latent, per side, and
            interpolate them; features that are already this small are not pooled.

    Raises AfaError: if a setting is out of range, or sizes do not fit each other.
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
                    f"aggregator.{name} must be at least 1; got {getattr(self, name)}.",
                )
        if self.hidden_ratio is not None and not self.hidden_ratio > 0:
            raise AfaError(
                "AFA-FUSION-010",
                f"aggregator.hidden_ratio must be above 0; got {self.hidden_ratio}.",
            )
        if self.hidden_size % self.num_heads:
            raise AfaError(
                "AFA-FUSION-011",
                f"aggregator.hidden_size must be a multiple of num_heads; got {self.hidden_size} "
                f"and {self.num_heads}. Change one of them.",
            )
        if self.hidden_size % self.norm_num_groups or self.hidden_size == self.norm_num_groups:
            # with one channel per group, group norm removes what the timestep adds to the channel
            quarter = max(1, self.hidden_size // 4)
            fitting = max(g for g in range(1, quarter + 1) if self.hidden_size % g == 0)
            raise AfaError(
                "AFA-FUSION-012",
                "aggregator.hidden_size must be a multiple of norm_num_groups, and at least twice "
                f"it; got {self.hidden_size} and {self.norm_num_groups}. Choose norm_num_groups = "
                f"{fitting} or a larger hidden_size.",
            )

    def for_predictions(self) -> Self:
        """The same settings for an ensemble of predictions, which has no features.

        `hidden_ratio` is relative to the channels of features. So it becomes None, and weights get
        the resolution of the latent (`min_scale` 1); settings without `hidden_ratio` are kept.
        """
        return self if self.hidden_ratio is None else replace(self, hidden_ratio=None, min_scale=1)

    def at_last_site(self) -> Self:
        """The same settings for aggregators that fuse predictions alone, of adequate size."""
        return replace(self.for_predictions(), sites="conv_out")


@dataclass(frozen=True)
class SABWConfig(SABWSettings):
    """The settings of an aggregator and the properties of its site.

    Do not set the properties: `EnsembleDenoiser` fills them in.

    Attributes:
        num_experts: N.
        in_channels: the channels of the experts' features at the site.
        temb_channels: the width of the timestep embedding.
        text_channels: the width of a token's embedding.
        width: the experts' channels, by which `hidden_ratio` is multiplied.
        pool: the side of the features divided by the side of the weight grid.

    Raises AfaError: if a setting is out of range, or sizes do not fit each other.
    """

    num_experts: int | None = None
    in_channels: int | None = None
    temb_channels: int | None = None
    text_channels: int | None = None
    width: int | None = None
    pool: int = 1

    @property
    def channels(self) -> int:
        """Hidden channels at this site, a multiple of the head width and of two groups."""
        if self.hidden_ratio is None or self.width is None:
            return self.hidden_size
        unit = math.lcm(self.hidden_size // self.num_heads, 2 * self._group_size)
        asked = unit * max(1, round(self.hidden_ratio * self.width / unit))
        return min(asked, self.hidden_size)

    @property
    def heads(self) -> int:
        """Attention heads at this site; their width is the same at all sites."""
        return self.channels // (self.hidden_size // self.num_heads)

    @property
    def groups(self) -> int:
        """Groups of the group norms at this site; their size is the same at all sites."""
        return self.channels // self._group_size

    @property
    def _group_size(self) -> int:
        return self.hidden_size // self.norm_num_groups


class _Mix(nn.Conv2d):
    """A 1x1 convolution of N concatenated features, computed without concatenating them."""

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
    """Average 2x2 pixels; on a CPU five times as fast as `avg_pool2d`."""
    rows = feature[..., ::2, :] + feature[..., 1::2, :]
    mean = (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
    if mean.dtype != torch.float16:
        return mean
    # the sum of four may overflow where their mean does not. Quarters of tiny numbers lose bits, so
    # they are used only there. A branch on values would make the CPU wait for the GPU.
    quarter = feature * 0.25
    rows = quarter[..., ::2, :] + quarter[..., 1::2, :]
    return torch.where(mean.isfinite(), mean, rows[..., ::2] + rows[..., 1::2])


def pooled(feature: Tensor, pool: int) -> Tensor:
    """Average a feature [B, C, H, W] over windows of `pool` x `pool` pixels, also in float16."""
    while pool % 2 == 0 and feature.shape[-1] % 2 == 0 and feature.shape[-2] % 2 == 0:
        feature, pool = _halved(feature), pool // 2
    return feature if pool == 1 else F.avg_pool2d(feature, pool, ceil_mode=True)


class SABW(FusionRule):
    """Fuse the experts' features with per-pixel softmax weights (AFA, section 3.2, eqs. 3 and 4).

    The weights come from a 1x1 convolution of the concatenated features, a ResNet block conditioned
    on the timestep, a 2-D transformer that attends to the prompt, and a 1x1 convolution to one
    logit per expert. The last convolution starts at zero, so an untrained ensemble is the uniform
    mean. Parameter names are those of the published code.

    Args:
        config: the settings, with all properties of the site filled in.

    Raises:
        AfaError: if a property of the site is missing.
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
                f"The config lacks properties of the site: {', '.join(missing)}. Set them, or pass "
                "the config to EnsembleDenoiser, which fills them in.",
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
        """Compute the experts' fusion weights at every pixel (AFA, eq. 3).

        Args:
            features: the N experts' features, each [B, C, H, W].
            condition: the mean timestep embedding [B, T] and the mean text embedding [B, L, D].
            missing: the numbers of experts that get weight 0.

        Returns: [B, N, H, W] in float32, which sums to 1 over N.
        """
        dtype, size = self.conv_in.weight.dtype, (features[0].shape[-2], features[0].shape[-1])
        hidden = self.conv_in([pooled(feature, self.config.pool).to(dtype) for feature in features])
        temb = condition.temb.to(dtype) if self.config.timestep else None
        hidden = self.res_block(hidden, temb)
        hidden = self.transformer(hidden, **self._prompt(condition), return_dict=False)[0]
        logits = self.conv_out(hidden).float()
        if not self.config.spatial:
            logits = logits.mean((2, 3), keepdim=True)
        elif self.config.pool > 1:
            logits = F.interpolate(logits, size, mode="bilinear")
        if condition.bias is not None:
            logits = logits + bias_at(condition.bias, logits, size)
        if missing:
            logits[:, missing] = -math.inf
        return logits.softmax(dim=1).expand(-1, -1, *size)

    def _prompt(self, condition: Condition) -> dict[str, Tensor | None]:
        """The transformer's arguments for cross attention to the prompt."""
        if not self.config.prompt or condition.text is None:
            return {}
        given, dtype = condition.text, self.conv_in.weight.dtype
        text = given
        if given.dtype != dtype:
            text = once_per_prompt(given, dtype, lambda: given.to(dtype))
        return {"encoder_hidden_states": text, "encoder_attention_mask": condition.text_mask}

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Fuse the experts' features at one site with per-pixel weights (AFA, eqs. 3 and 4).

        Args:
            features: the N experts' features, each [B, C, H, W].
            condition: the mean timestep embedding [B, T] and the mean text embedding [B, L, D].

        Returns: the fused feature [B, C, H, W], in the features' data type, and the weights
            [B, N, H, W], in float32.

        Raises:
            AfaError: if the number of features is not the config's `num_experts`.
        """
        if len(features) != self.config.num_experts:
            raise AfaError(
                "AFA-FUSION-014",
                f"This aggregator fuses {self.config.num_experts} experts; got {len(features)} "
                "features. Use the experts with which it was trained.",
            )
        weights = self.fusion_weights(features, condition)
        return Fused(weighted_sum(features, weights), weights)

    def fuse_some(self, features: Mapping[int, Tensor], condition: Condition) -> Fused:
        """Fuse the features of some experts with per-pixel weights that sum to 1 over them.

        The aggregator sees the mean of the given features in place of a missing one. With a single
        feature it does not run; that expert's weight is 1.

        Args:
            features: the features [B, C, H, W] by expert number, at least one.
            condition: the mean timestep embedding [B, T] and the mean text embedding [B, L, D].

        Returns: the fused feature [B, C, H, W] and the weights [B, N, H, W] of all experts, which
            are 0 for missing ones.
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
