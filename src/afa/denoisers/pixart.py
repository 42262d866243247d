"""Diffusers' `PixArtTransformer2DModel` as a coroutine: PixArt-alpha and PixArt-sigma.

`pixart_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Conditioning, Family, PipelineKind, Widths
from afa.denoisers.prompt import once_per_prompt, versions
from afa.denoisers.splitting import split_text
from afa.denoisers.tokens import (
    fill_out_channels,
    require_blocks,
    to_grid,
    to_tokens,
    unpatchify,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes


def pixart_blocks(
    transformer: PixArtTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one PixArt transformer site by site.

    Sites, in order: `embed`; `block.K` after each block; `out`, the prediction, including the
    learned variance if there is one. The text has no stream; blocks read it by cross attention.

    Args:
        hidden_states: noisy latent [B, C, H, W].
        encoder_hidden_states: text embedding [B, L, D].
        timestep: [B].
        added_cond_kwargs: `resolution` [B, 2] and `aspect_ratio` [B, 1], for models of 1024 pixels.
        cross_attention_kwargs: arguments of the attention processors.
        attention_mask: mask of the image tokens [B, K], 1 keeps.
        encoder_attention_mask: mask of the text [B, L], 1 keeps; or a bias of scores [B, 1, L].

    Yields: features [B, C', H / P, W / P], where P is the patch size.

    Returns: the prediction [B, C'', H, W], with twice the channels if it includes the variance.
    """
    patch, dtype = transformer.config.patch_size, hidden_states.dtype
    batch, _, *size = hidden_states.shape
    height, width = (side // patch for side in size)

    hidden = transformer.pos_embed(hidden_states)
    modulation, temb = transformer.adaln_single(
        timestep, added_cond_kwargs, batch_size=batch, hidden_dtype=hidden.dtype
    )
    text, project = encoder_hidden_states, transformer.caption_projection
    if project is not None:
        text = once_per_prompt(
            encoder_hidden_states,
            (project, *versions(project)),
            lambda: project(encoder_hidden_states).view(batch, -1, hidden.shape[-1]),
        )
    kwargs: dict[str, Any] = {
        "attention_mask": _as_bias(attention_mask, dtype),
        "encoder_hidden_states": text,
        "encoder_attention_mask": _as_bias(encoder_attention_mask, dtype),
        "timestep": modulation,
        "cross_attention_kwargs": cross_attention_kwargs,
        "class_labels": None,
    }

    def layer(block: nn.Module, hidden: Tensor) -> Tensor:
        return execution.run(block, hidden, **kwargs)

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))
    for k, block in enumerate(transformer.transformer_blocks):
        site = f"block.{k}"
        hidden = execution.segment(site, layer, block, hidden)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))

    def output(hidden: Tensor) -> Tensor:
        shift, scale = (transformer.scale_shift_table[None] + temb[:, None]).chunk(2, dim=1)
        out = transformer.proj_out(transformer.norm_out(hidden) * (1 + scale) + shift)
        return unpatchify(out, height, width, patch)

    return (yield Feature("out", execution.segment("out", output, hidden), temb))


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a mask of keys [B, K] to a bias of attention scores [B, 1, K]."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def pixart_example(transformer: PixArtTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    side = config.patch_size * 2
    (text_width,) = _widths(transformer).text
    example: dict[str, Any] = {
        "hidden_states": torch.empty(1, config.in_channels, side, side, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, text_width, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if transformer.use_additional_conditions:
        example["added_cond_kwargs"] = {
            "resolution": torch.empty(1, 2, device="meta"),
            "aspect_ratio": torch.empty(1, 1, device="meta"),
        }
    return example


def _widths(transformer: PixArtTransformer2DModel) -> Widths:
    config = transformer.config
    return Widths((config.caption_channels or config.cross_attention_dim,))


def _canonical_config(config: dict[str, Any]) -> None:
    fill_out_channels(config)
    if config["use_additional_conditions"] is None:
        config["use_additional_conditions"] = config["sample_size"] == 128


def _variant(shapes: Shapes) -> str | None:
    return "PixArt" if any(name.startswith("adaln_single.") for name in shapes) else None


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, mask, _, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, device=pipeline.text_encoder.device
    )
    return {"text": text, "mask": mask}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text, config = conditions["text"], pipeline.transformer.config
    batch, channels, height, width = noisy.shape
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if config.sample_size == 128:
        pixels = torch.tensor([height, width]) * pipeline.vae_scale_factor
        added["resolution"] = pixels.to(text).expand(batch, 2)
        added["aspect_ratio"] = torch.full((batch, 1), height / width).to(text)
    predicted = denoiser(
        noisy.to(text.dtype),
        encoder_hidden_states=text,
        encoder_attention_mask=conditions["mask"],
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return predicted[:, :channels]  # without the learned variance


_KIND = PipelineKind(
    name="PixArt",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    text=("text_encoder",),
    carries_prompts=True,
    conditioning=Conditioning(_encode, _predict),
    # the same prompts in training and drawing, whichever optional packages are installed
    call={"use_resolution_binning": False, "clean_caption": False},
    prepare=lambda prompt: prompt.lower().strip(),  # as the pipelines do without cleaning
)
PIXART = Family(
    name="pixart",
    model_class=PixArtTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=pixart_blocks,
    layers=lambda model: list(model.transformer_blocks),
    check=lambda model: require_blocks(model, {"transformer_blocks": "BasicTransformerBlock"}),
    example=pixart_example,
    widths=_widths,
    split=lambda _, *given: split_text(*given),
    attention_kwargs="cross_attention_kwargs",
    text_mask="encoder_attention_mask",
    repeated_blocks=("BasicTransformerBlock",),
    canonical_config=_canonical_config,
    variant=_variant,
    pipelines=(_KIND,),
)
