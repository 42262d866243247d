"""Diffusers' `FluxTransformer2DModel` as a coroutine.

`flux_blocks` reads like the library's own forward pass and calls its public submodules. Sent
straight back, its features give the library's own output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Family, Widths, split_pooled, split_text
from afa.denoisers.prompt import once_per_prompt
from afa.denoisers.tokens import (
    TEXT,
    grid_of,
    require_blocks,
    to_column,
    to_grid,
    to_tokens,
)
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

#: of the library's `FluxPipeline`; the model multiplies by it again
_TIMESTEP_DIVISOR = 1000


def check_flux(transformer: FluxTransformer2DModel) -> None:
    """Refuse blocks that `flux_blocks` does not know.

    Raises:
        AfaError: names the first one.
    """
    kinds = {
        "transformer_blocks": "FluxTransformerBlock",
        "single_transformer_blocks": "FluxSingleTransformerBlock",
    }
    require_blocks(transformer, kinds.items())


def flux_blocks(
    transformer: FluxTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    controlnet_single_block_samples: Sequence[Tensor] | None = None,
    controlnet_blocks_repeat: bool = False,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one transformer of Flux site by site.

    Sites, in order: `embed`; `double.K` and `double.K.text` for the streams of image and text after
    each double-stream block; `single.K` and `single.K.text` after each single-stream block, where
    the last one's text is used no more and is no site; `out`, the packed prediction. The paper
    (AFA, appendix on transformers) leaves open what becomes of the text; here its stream is fused
    like the image's, at sites of its own, since it differs between experts after the first block.
    ControlNet residuals are added after a site.

    Args:
        transformer: the expert.
        hidden_states: packed noisy latent [B, H * W, C]; the grid is that of `img_ids`.
        encoder_hidden_states: embedding of the text [B, L, D].
        pooled_projections: embedding of the text as a whole [B, D'].
        timestep: [B], from 0 to 1.
        img_ids: [H * W, 3].
        txt_ids: [L, 3].
        guidance: the guidance scale [B], of models that were distilled with it.
        joint_attention_kwargs: handed to the attention processors; IP-Adapter images.
        controlnet_block_samples: ControlNet's, for the double-stream blocks.
        controlnet_single_block_samples: likewise for the single-stream blocks.
        controlnet_blocks_repeat: whether those are taken in turns.
        execution: how the blocks are run.

    Yields: features [B, C, H, W] of the image, [B, C, L, 1] of the text.

    Returns: the packed prediction [B, H * W, C].

    Raises:
        AfaError: `joint_attention_kwargs` has a LoRA `scale`, which only a model as a whole can
            apply, or the tokens are not those of one image.
    """
    attention_kwargs = own_attention_kwargs(joint_attention_kwargs)
    positions = img_ids
    img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
    # asked once: to read positions, the processor has to wait for a GPU
    height, width = once_per_prompt(positions, grid_of, lambda: grid_of(img_ids))

    hidden = transformer.x_embedder(hidden_states)
    time = timestep.to(hidden.dtype) * _TIMESTEP_DIVISOR
    guided = () if guidance is None else (guidance.to(hidden.dtype) * 1000,)
    temb = transformer.time_text_embed(time, *guided, pooled_projections)
    text = transformer.context_embedder(encoder_hidden_states)
    rotary = transformer.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
    if "ip_adapter_image_embeds" in attention_kwargs:
        images = attention_kwargs.pop("ip_adapter_image_embeds")
        attention_kwargs["ip_hidden_states"] = transformer.encoder_hid_proj(images)

    def layer(block: nn.Module, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return execution.run(
            block,
            hidden_states=hidden,
            encoder_hidden_states=text,
            temb=temb,
            image_rotary_emb=rotary,
            joint_attention_kwargs=attention_kwargs,
        )

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))

    blocks, residuals = transformer.transformer_blocks, controlnet_block_samples
    for k, block in enumerate(blocks):
        site = f"double.{k}"
        text, hidden = execution.segment(site, layer, block, hidden, text) or (None, None)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if residuals is not None and controlnet_blocks_repeat:
            hidden = hidden + residuals[k % len(residuals)]
        elif residuals is not None:
            hidden = hidden + residuals[k // _interval(blocks, residuals)]

    blocks, residuals = transformer.single_transformer_blocks, controlnet_single_block_samples
    for k, block in enumerate(blocks):
        site = f"single.{k}"
        text, hidden = execution.segment(site, layer, block, hidden, text) or (None, None)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        if k < len(blocks) - 1:
            text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if residuals is not None:
            hidden = hidden + residuals[k // _interval(blocks, residuals)]

    def output(hidden: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(hidden, temb))

    out = execution.segment("out", output, hidden)
    return to_tokens((yield Feature("out", to_grid(out, height, width), temb)))


def _interval(blocks: Any, residuals: Sequence[Tensor]) -> int:
    """How many blocks one residual of a ControlNet is for: the quotient, rounded up."""
    return -(-len(blocks) // len(residuals))


def own_attention_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """A copy that may be changed.

    Raises:
        AfaError: it has a LoRA `scale`.
    """
    if given and "scale" in given:
        raise AfaError(
            "A LoRA scale must be applied to the whole model, came as an attention argument of a "
            "coroutine. Call the ensemble, which applies it to every expert."
        )
    return dict(given or {})


def flux_layers(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    """The blocks, which `flux_blocks` runs through its `execution`, in order."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def flux_example(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """The smallest complete input of this transformer's forward pass, on the meta device."""
    config = transformer.config
    example = {
        "hidden_states": torch.empty(1, 4, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_ids": torch.empty(4, len(config.axes_dims_rope), device="meta"),
        "txt_ids": torch.empty(1, len(config.axes_dims_rope), device="meta"),
    }
    if config.guidance_embeds:
        example["guidance"] = torch.empty(1, device="meta")
    return example


def _widths(transformer: FluxTransformer2DModel) -> Widths:
    config = transformer.config
    return Widths((config.joint_attention_dim,), (config.pooled_projection_dim,))


def _split(
    model: Any, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    del model
    texts = split_text(arguments, widths, count)
    return split_pooled(texts, arguments["pooled_projections"], widths)


FLUX = Family(
    name="flux",
    model_class=FluxTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=flux_blocks,
    layers=flux_layers,
    check=check_flux,
    example=flux_example,
    widths=_widths,
    split=_split,
    batches_guidance=False,
    timestep_divisor=_TIMESTEP_DIVISOR,
)
