"""Diffusers' `UNet2DConditionModel` as a coroutine: Stable Diffusion 1.x, 2.x and XL.

`unet_blocks` reads like diffusers' own forward pass and calls its public submodules; no code is
copied. It yields the feature of every site (AFA, section 3.2) and continues with the feature that
is sent back. If features are sent back unchanged, the result equals diffusers' forward bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import apply_freeu

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Family, Widths
from afa.denoisers.splitting import split_joined, split_text
from afa.denoisers.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, unet_variant
from afa.denoisers.unet_config import canonical_unet_config
from afa.denoisers.unet_names import original_layers
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

_LAYERED_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_LAYERED_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn")


def check_unet(unet: UNet2DConditionModel) -> None:
    """Check that a U-Net has only blocks and conditions that `unet_blocks` supports.

    Raises:
        AfaError: if not; it names the first unsupported block or condition.
    """
    added = unet.config.addition_embed_type
    if added not in (None, "text", "text_time"):
        raise AfaError(
            "AFA-MODEL-016",
            f"U-Nets with addition_embed_type = '{added}' are not supported; only None, 'text' and "
            "'text_time' are. Use experts of Stable Diffusion 1.x, 2.x or XL.",
        )
    kinds: list[tuple[str, Any, tuple[str, ...]]]
    kinds = [(f"down_blocks.{i}", b, _LAYERED_DOWN) for i, b in enumerate(unet.down_blocks)]
    kinds += [("mid_block", unet.mid_block, _MID)] if unet.mid_block is not None else []
    kinds += [(f"up_blocks.{i}", b, _LAYERED_UP) for i, b in enumerate(unet.up_blocks)]
    for name, block, known in kinds:
        if type(block).__name__ not in known:
            raise AfaError(
                "AFA-MODEL-017",
                f"{name} is a {type(block).__name__}, which is not supported in U-Nets; only "
                f"{', '.join(known)} are. Use experts of Stable Diffusion 1.x, 2.x or XL.",
            )


def unet_blocks(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    *,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    down_block_additional_residuals: Sequence[Tensor] | None = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one U-Net site by site (AFA, section 3.2 and figure 2).

    Sites, in order: `conv_in`; in every down block `down.B.L` for each layer (resnet, attention)
    and `down.B.downsample`; `mid`; `up.B.L` for each layer, the last one with its upsampler;
    `conv_out`. The last up layer is not a site: the expert's own output layers follow directly.
    Skip connections carry the features that were sent back. Residuals of ControlNets and
    T2I-Adapters are added after a site, so aggregators see features like those in training.

    Args:
        sample: noisy latent [B, C, H, W].
        timestep: one for all, or [B].
        encoder_hidden_states: text embedding [B, L, D].
        class_labels: [B], for U-Nets with classes. This and what follows is as in diffusers.
        timestep_cond: embedding of the guidance scale [B, D'].
        attention_mask: [B, L], 1 keeps a key and 0 discards it.
        cross_attention_kwargs: arguments of the attention processors; `gligen` is supported.
        added_cond_kwargs: IP-Adapter images; for Stable Diffusion XL `text_embeds` [B, D''] and
            `time_ids` [B, 6], or [B, 5] for its refiner.
        down_block_additional_residuals: a ControlNet's, one per skip connection.
        mid_block_additional_residual: a ControlNet's, for the mid block.
        down_intrablock_additional_residuals: a T2I-Adapter's, one per down block.
        encoder_attention_mask: [B, L], true keeps a token of the text and false discards it.

    Yields: the feature [B, C', H', W'] of each site; the fused one must be sent back.

    Returns: the prediction [B, C, H, W], which is the feature that was sent back at `conv_out`.

    Raises:
        AfaError: if only one of ControlNet's two residuals is given, or `cross_attention_kwargs`
            has a LoRA `scale`, which only the ensemble can apply.
    """
    if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
        raise AfaError(
            "AFA-MODEL-018",
            "Only one of down_block_additional_residuals and mid_block_additional_residual is "
            "given; ControlNet residuals need both. Pass a T2I-Adapter's residuals as "
            "down_intrablock_additional_residuals.",
        )
    if cross_attention_kwargs and "scale" in cross_attention_kwargs:
        raise AfaError(
            "AFA-MODEL-019",
            "cross_attention_kwargs of a coroutine must not contain a LoRA scale. Call the "
            "ensemble, which applies the scale to every expert.",
        )
    adapter_residuals = list(down_intrablock_additional_residuals or ())

    # as in diffusers: upsamplers need the output size if halving and doubling do not cancel out
    factor = 2**unet.num_upsamplers
    forward_upsample_size = any(size % factor != 0 for size in sample.shape[-2:])

    text_kwargs: dict[str, Any] = {
        "attention_mask": _as_bias(attention_mask, sample.dtype),
        "encoder_attention_mask": _as_bias(encoder_attention_mask, sample.dtype),
    }
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0

    added_cond_kwargs = added_cond_kwargs or {}
    temb = unet.time_embedding(unet.get_time_embed(sample, timestep), timestep_cond)
    class_embedding = unet.get_class_embed(sample, class_labels)
    if class_embedding is not None and unet.config.class_embeddings_concat:
        temb = torch.cat([temb, class_embedding], dim=-1)
    elif class_embedding is not None:
        temb = temb + class_embedding
    added = unet.get_aug_embed(temb, encoder_hidden_states, added_cond_kwargs)
    if added is not None:
        temb = temb + added
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)

    if cross_attention_kwargs and cross_attention_kwargs.get("gligen") is not None:
        objects = unet.position_net(**cross_attention_kwargs["gligen"])
        cross_attention_kwargs = {**cross_attention_kwargs, "gligen": {"objs": objects}}
    text_kwargs["cross_attention_kwargs"] = cross_attention_kwargs

    run = execution.run

    def layer(block: Any, index: int, hidden: Tensor) -> Tensor:
        hidden = run(block.resnets[index], hidden, temb)
        if getattr(block, "has_cross_attention", False):
            attention = block.attentions[index]
            hidden = run(
                attention, hidden, encoder_hidden_states=text, return_dict=False, **text_kwargs
            )[0]
        return hidden

    def up_layer(block: Any, index: int, hidden: Tensor, skip: Tensor, size: Any) -> Tensor:
        hidden = layer(block, index, _join_skip(block, hidden, skip))
        if index == len(block.resnets) - 1:
            for upsampler in block.upsamplers or ():
                hidden = run(upsampler, hidden, size)
        return hidden

    def middle(hidden: Tensor) -> Tensor:
        if getattr(unet.mid_block, "has_cross_attention", False):
            return run(unet.mid_block, hidden, temb, encoder_hidden_states=text, **text_kwargs)
        return run(unet.mid_block, hidden, temb)

    hidden = yield Feature("conv_in", unet.conv_in(sample), temb)
    skips = [hidden]

    for b, block in enumerate(unet.down_blocks):
        attends = getattr(block, "has_cross_attention", False)
        for i in range(len(block.resnets)):
            site = f"down.{b}.{i}"
            hidden = yield Feature(site, execution.segment(site, layer, block, i, hidden), temb)
            is_last = i == len(block.resnets) - 1
            if attends and is_last and adapter_residuals:
                hidden = hidden + adapter_residuals.pop(0)
            skips.append(hidden)
        for downsampler in block.downsamplers or ():
            site = f"down.{b}.downsample"
            hidden = yield Feature(site, execution.segment(site, run, downsampler, hidden), temb)
            skips.append(hidden)
        if not attends and adapter_residuals:
            # diffusers adds this residual in place, which also changes the skip connection
            hidden = skips[-1] = hidden + adapter_residuals.pop(0)

    if down_block_additional_residuals is not None:
        skips = [s + r for s, r in zip(skips, down_block_additional_residuals, strict=True)]

    if unet.mid_block is not None:
        hidden = yield Feature("mid", execution.segment("mid", middle, hidden), temb)
        if adapter_residuals and adapter_residuals[0].shape == hidden.shape:
            hidden = hidden + adapter_residuals.pop(0)
    if mid_block_additional_residual is not None:
        hidden = hidden + mid_block_additional_residual

    for b, block in enumerate(unet.up_blocks):
        is_last_block = b == len(unet.up_blocks) - 1
        for i in range(len(block.resnets)):
            is_last_layer = i == len(block.resnets) - 1
            skip, size = skips.pop(), None
            if forward_upsample_size and is_last_layer and not is_last_block:
                size = skips[-1].shape[2:]
            site = "conv_out" if is_last_layer and is_last_block else f"up.{b}.{i}"
            hidden = execution.segment(site, up_layer, block, i, hidden, skip, size)
            if site != "conv_out":
                hidden = yield Feature(site, hidden, temb)

    def output(hidden: Tensor) -> Tensor:
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden)

    return (yield Feature("conv_out", execution.segment("conv_out", output, hidden), temb))


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a mask of keys [B, K] to a bias of attention scores [B, 1, K]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _join_skip(block: Any, hidden: Tensor, skip: Tensor) -> Tensor:
    """Concatenate a skip connection, with FreeU (Si et al., 2023) if it is switched on."""
    scales = {key: getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")}
    if all(scales.values()):
        # FreeU scales in place, but all experts share the fused feature
        hidden, skip = apply_freeu(block.resolution_idx, hidden.clone(), skip, **scales)
    return torch.cat([hidden, skip], dim=1)


def unet_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The large modules of a U-Net, in order; `unet_blocks` runs them through its `execution`."""
    kinds = ("resnets", "attentions", "downsamplers", "upsamplers")

    def layers(blocks: Sequence[nn.Module]) -> list[nn.Module]:
        lists = [getattr(block, kind, None) or () for block in blocks for kind in kinds]
        return [layer for listed in lists for layer in listed]

    mid = [] if unet.mid_block is None else [unet.mid_block]
    return [*layers(unet.down_blocks), *mid, *layers(unet.up_blocks)]


def unet_example(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The smallest complete arguments of this U-Net's forward pass, on the meta device."""
    config = unet.config
    size = config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    (text_width,) = _widths(unet).text
    example: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, height, width, device="meta"),
        "timestep": torch.empty(1, dtype=torch.int64, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, text_width, device="meta"),
    }
    if unet.class_embedding is not None:
        if config.class_embed_type in (None, "timestep"):
            example["class_labels"] = torch.empty(1, dtype=torch.int64, device="meta")
        else:
            in_features = config.projection_class_embeddings_input_dim or 4 * height
            example["class_labels"] = torch.empty(1, in_features, device="meta")
    if config.addition_embed_type == "text_time":
        example["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, _pooled_width(unet, num_ids=5), device="meta"),
            "time_ids": torch.empty(1, 5, device="meta"),
        }
    return example


def _widths(unet: UNet2DConditionModel) -> Widths:
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    return Widths((width if isinstance(width, int) else width[0],))


def _pooled_width(unet: UNet2DConditionModel, num_ids: int) -> int:
    """The pooled text's width in Stable Diffusion XL's added embedding; the rest is for sizes."""
    config = unet.config
    return config.projection_class_embeddings_input_dim - num_ids * config.addition_time_embed_dim


def _split(
    unet: UNet2DConditionModel, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    per_expert = split_text(arguments, widths, count)
    added = arguments.get("added_cond_kwargs")
    if not added or "text_embeds" not in added:
        return per_expert
    pooled_widths = widths.pooled
    if not pooled_widths and "time_ids" in added:
        pooled_widths = (_pooled_width(unet, added["time_ids"].shape[-1]),)
    pooled = split_joined(
        "pooled text embedding",
        added["text_embeds"],
        pooled_widths or (added["text_embeds"].shape[-1],),
        count,
    )
    return [
        {**own, "added_cond_kwargs": {**added, "text_embeds": part}}
        for own, part in zip(per_expert, pooled, strict=True)
    ]


UNET = Family(
    name="unet",
    model_class=UNet2DConditionModel,
    output_class=UNet2DConditionOutput,
    blocks=unet_blocks,
    layers=unet_layers,
    check=check_unet,
    example=unet_example,
    widths=_widths,
    split=_split,
    attention_kwargs="cross_attention_kwargs",
    text_mask="encoder_attention_mask",
    is_residual=False,
    latent="sample",
    component="unet",
    # whole blocks contain loops over layers, so their parts are compiled
    repeated_blocks=("ResnetBlock2D", "BasicTransformerBlock"),
    original_blocks=("input_blocks", "output_blocks"),
    library_blocks=("down_blocks", "up_blocks"),
    original_layers=original_layers,
    canonical_config=canonical_unet_config,
    variant=unet_variant,
    pipelines=(STABLE_DIFFUSION, STABLE_DIFFUSION_XL),
)
