"""Diffusers' `DiTTransformer2DModel` as a coroutine.

`dit_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn import functional

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Family, PipelineKind, Widths
from afa.denoisers.tokens import (
    fill_out_channels,
    require_blocks,
    to_grid,
    to_tokens,
    unpatchify,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def dit_blocks(
    transformer: DiTTransformer2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    class_labels: Tensor,
    cross_attention_kwargs: dict[str, Any] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one DiT site by site.

    Sites, in order: `embed`; `block.K` after each block; `out`, the prediction, including the
    learned variance if there is one. There is no text. Aggregators see the class only through the
    timestep embedding, to which the model adds the class embedding.

    Args:
        hidden_states: noisy latent [B, C, S, S]; diffusers supports only squares.
        timestep: [B].
        class_labels: [B].
        cross_attention_kwargs: arguments of the attention processors.

    Yields: features [B, C', S / P, S / P], where P is the patch size.

    Returns: the prediction [B, C'', S, S], with twice the channels if it includes the variance.
    """
    patch = transformer.config.patch_size
    height, width = (side // patch for side in hidden_states.shape[-2:])
    blocks = transformer.transformer_blocks

    hidden = transformer.pos_embed(hidden_states)
    temb = execution.run(blocks[0].norm1.emb, timestep, class_labels, hidden_dtype=hidden.dtype)
    kwargs: dict[str, Any] = {
        "timestep": timestep,
        "class_labels": class_labels,
        "cross_attention_kwargs": cross_attention_kwargs,
    }

    def layer(block: nn.Module, hidden: Tensor) -> Tensor:
        return execution.run(block, hidden, **kwargs)

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))
    for k, block in enumerate(blocks):
        site = f"block.{k}"
        hidden = execution.segment(site, layer, block, hidden)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))

    def output(hidden: Tensor) -> Tensor:
        shift, scale = transformer.proj_out_1(functional.silu(temb)).chunk(2, dim=1)
        hidden = transformer.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        return unpatchify(transformer.proj_out_2(hidden), height, width, patch)

    return (yield Feature("out", execution.segment("out", output, hidden), temb))


def dit_example(transformer: DiTTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    side = config.patch_size * 2
    return {
        "hidden_states": torch.empty(1, config.in_channels, side, side, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "class_labels": torch.empty(1, dtype=torch.int64, device="meta"),
    }


DIT = Family(
    name="dit",
    model_class=DiTTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=dit_blocks,
    # the first block's embedding is run by itself as well
    layers=lambda model: [model.transformer_blocks[0].norm1.emb, *model.transformer_blocks],
    check=lambda model: require_blocks(model, {"transformer_blocks": "BasicTransformerBlock"}),
    example=dit_example,
    widths=lambda _: Widths(()),
    # each expert embeds the class itself
    split=lambda _model, arguments, _widths, count: [dict(arguments)] * count,
    attention_kwargs="cross_attention_kwargs",
    prompt="class_labels",
    repeated_blocks=("BasicTransformerBlock",),
    canonical_config=fill_out_channels,
    pipelines=(PipelineKind("DiT", ("DiTPipeline",)),),
)
