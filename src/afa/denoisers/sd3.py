"""Diffusers' `SD3Transformer2DModel` as a coroutine: Stable Diffusion 3 and 3.5.

`sd3_blocks` reads like the library's own forward pass and calls its public submodules. Sent
straight back, its features give the library's own output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn import functional

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Family, Widths, split_joined, split_pooled
from afa.denoisers.flux import own_attention_kwargs
from afa.denoisers.tokens import TEXT, require_blocks, to_column, to_grid, to_tokens, unpatchify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


def check_sd3(transformer: SD3Transformer2DModel) -> None:
    """Refuse blocks that `sd3_blocks` does not know.

    Raises:
        AfaError: names the first one.
    """
    require_blocks(transformer, [("transformer_blocks", "JointTransformerBlock")])


def sd3_blocks(
    transformer: SD3Transformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    block_controlnet_hidden_states: Sequence[Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    skip_layers: Sequence[int] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one transformer of Stable Diffusion 3 site by site.

    Sites, in order: `embed`; `block.K` and `block.K.text` for the streams of image and text after
    each block, where the last one's text is used no more and is no site; `out`, the prediction. See
    `flux_blocks` for the text. ControlNet residuals are added after a site.

    Args:
        transformer: the expert.
        hidden_states: noisy latent [B, C, H, W].
        encoder_hidden_states: embedding of the text [B, L, D].
        pooled_projections: embedding of the text as a whole [B, D'].
        timestep: [B].
        block_controlnet_hidden_states: ControlNet's.
        joint_attention_kwargs: handed to the attention processors; IP-Adapter images.
        skip_layers: numbers of blocks that are not run and are no sites (skip-layer guidance).
        execution: how the blocks are run.

    Yields: features [B, C, H / P, W / P] of the image, [B, C, L, 1] of the text.

    Returns: the prediction [B, C, H, W].

    Raises:
        AfaError: `joint_attention_kwargs` has a LoRA `scale`, which only a model as a whole can
            apply.
    """
    attention_kwargs = own_attention_kwargs(joint_attention_kwargs)
    patch = transformer.config.patch_size
    height, width = (side // patch for side in hidden_states.shape[-2:])

    hidden = transformer.pos_embed(hidden_states).contiguous()
    temb = transformer.time_text_embed(timestep, pooled_projections)
    text = transformer.context_embedder(encoder_hidden_states)
    if "ip_adapter_image_embeds" in attention_kwargs:
        images = attention_kwargs.pop("ip_adapter_image_embeds")
        ip_hidden_states, ip_temb = transformer.image_proj(images, timestep)
        attention_kwargs |= {"ip_hidden_states": ip_hidden_states, "temb": ip_temb}

    def layer(block: nn.Module, hidden: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor]:
        return execution.run(
            block,
            hidden_states=hidden,
            encoder_hidden_states=text,
            temb=temb,
            joint_attention_kwargs=attention_kwargs,
        )

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))

    blocks, residuals = transformer.transformer_blocks, block_controlnet_hidden_states
    for k, block in enumerate(blocks):
        if k not in (skip_layers or ()):
            site = f"block.{k}"
            text, hidden = execution.segment(site, layer, block, hidden, text) or (None, None)
            hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
            if not block.context_pre_only:
                text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if residuals is not None and not block.context_pre_only:
            hidden = hidden + residuals[int(k / (len(blocks) / len(residuals)))]

    def output(hidden: Tensor) -> Tensor:
        out = transformer.proj_out(transformer.norm_out(hidden, temb))
        return unpatchify(out, height, width, patch)

    return (yield Feature("out", execution.segment("out", output, hidden), temb))


def sd3_layers(transformer: SD3Transformer2DModel) -> list[nn.Module]:
    """The blocks, which `sd3_blocks` runs through its `execution`, in order."""
    return list(transformer.transformer_blocks)


def sd3_example(transformer: SD3Transformer2DModel) -> dict[str, Any]:
    """The smallest complete input of this transformer's forward pass, on the meta device."""
    config = transformer.config
    side = config.patch_size * 2
    return {
        "hidden_states": torch.empty(1, config.in_channels, side, side, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }


def _widths(transformer: SD3Transformer2DModel) -> Widths:
    config = transformer.config
    return Widths((config.joint_attention_dim,), (config.pooled_projection_dim,))


def _split(
    transformer: SD3Transformer2DModel,
    arguments: Mapping[str, Any],
    widths: Widths,
    count: int,
) -> list[dict[str, Any]]:
    """Tokens of the CLIP encoders, [encoder 1 of all | encoder 2 of all | zeros], then of T5."""
    text, (width,) = arguments["encoder_hidden_states"], _widths(transformer).text
    if text.shape[-1] == width or not widths.num_clip_tokens:
        texts = split_joined("text embedding", text, (width,), count)
    else:
        clip, rest = text.tensor_split([widths.num_clip_tokens], dim=1)
        clips = split_joined(
            "text embedding", clip[..., : count * sum(widths.text[:2])], widths.text[:2], count
        )
        rests = split_joined("text embedding", rest, (width,), count)
        texts = [
            torch.cat([functional.pad(own, (0, width - own.shape[-1])), more], dim=1)
            for own, more in zip(clips, rests, strict=True)
        ]
    per_expert = [{**arguments, "encoder_hidden_states": own} for own in texts]
    return split_pooled(per_expert, arguments["pooled_projections"], widths)


SD3 = Family(
    name="sd3",
    model_class=SD3Transformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=sd3_blocks,
    layers=sd3_layers,
    check=check_sd3,
    example=sd3_example,
    widths=_widths,
    split=_split,
)
