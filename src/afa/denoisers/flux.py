"""Diffusers' `FluxTransformer2DModel` as a coroutine.

`flux_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers.coroutine import Blocks
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import (
    VAE_PREFIXES,
    Conditioning,
    Family,
    FileDenoiser,
    PipelineKind,
    SingleFiles,
    Widths,
)
from afa.denoisers.original_names import joined_blocks, outside
from afa.denoisers.splitting import split_pooled, split_text
from afa.denoisers.tokens import fill_out_channels, require_blocks
from afa.denoisers.two_streams import (
    GRID,
    Residuals,
    pack,
    positions_of,
    two_stream_blocks,
    unpack,
    with_ip_adapter,
)
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes
    from afa.denoisers.original_names import OriginalName

_GUIDANCE = 3.5  # the default of the pipelines of guidance-distilled models
_BLOCKS = {
    "transformer_blocks": "FluxTransformerBlock",
    "single_transformer_blocks": "FluxSingleTransformerBlock",
}
#: `FluxPipeline` divides timesteps by this, and the model multiplies by it again
_TIMESTEP_DIVISOR = 1000


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
    """Run one Flux transformer site by site.

    Sites, in order: `embed`; `double.K` and `double.K.text` for the image and text streams after
    each double-stream block; `single.K` and `single.K.text` after each single-stream block, but
    without the text of the last one, which is not used; `out`, the packed prediction. The paper
    (AFA, appendix on transformers) does not say how the text stream is fused. Here it is fused like
    the image stream, at its own sites, because it differs between experts after the first block.
    ControlNet residuals are added after a site.

    Args:
        hidden_states: packed noisy latent [B, H * W, C]; `img_ids` defines its grid.
        encoder_hidden_states: text embedding [B, L, D].
        pooled_projections: pooled text embedding [B, D'].
        timestep: [B], from 0 to 1.
        img_ids: position ids of the image tokens [H * W, 3].
        txt_ids: position ids of the text tokens [L, 3].
        guidance: the guidance scale [B], for guidance-distilled models.
        joint_attention_kwargs: arguments of the attention processors; IP-Adapter images.
        controlnet_block_samples: a ControlNet's residuals for the double-stream blocks.
        controlnet_single_block_samples: the same for the single-stream blocks.
        controlnet_blocks_repeat: whether the blocks use the double-stream residuals in turn.

    Yields: features [B, C, H, W] of the image and [B, C, L, 1] of the text.

    Returns: the packed prediction [B, H * W, C].

    Raises:
        AfaError: if `joint_attention_kwargs` has a LoRA `scale`, which only the ensemble can apply,
            or the image tokens do not fill one rectangle.
    """
    attention_kwargs = with_ip_adapter(transformer, joint_attention_kwargs)
    size, rotary = positions_of(transformer, img_ids, txt_ids)

    hidden = transformer.x_embedder(hidden_states)
    time = timestep.to(hidden.dtype) * _TIMESTEP_DIVISOR
    guided = () if guidance is None else (guidance.to(hidden.dtype) * 1000,)
    temb = transformer.time_text_embed(time, *guided, pooled_projections)
    text = transformer.context_embedder(encoder_hidden_states)

    def layer(block: nn.Module, _: int, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return execution.run(
            block,
            hidden_states=hidden,
            encoder_hidden_states=text,
            temb=temb,
            image_rotary_emb=rotary,
            joint_attention_kwargs=attention_kwargs,
        )

    def output(hidden: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(hidden, temb))

    residuals = Residuals(
        controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
    )
    return (
        yield from two_stream_blocks(
            transformer,
            hidden,
            text,
            temb,
            size,
            double=layer,
            single=layer,
            output=output,
            residuals=residuals,
            execution=execution,
        )
    )


def flux_example(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
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


def joint_widths(transformer: Any) -> Widths:
    """The widths of the two texts of a transformer with joint attention."""
    config = transformer.config
    return Widths((config.joint_attention_dim,), (config.pooled_projection_dim,))


def _split(
    model: Any, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    del model
    texts = split_text(arguments, widths, count)
    return split_pooled(texts, arguments["pooled_projections"], widths)


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, pooled, _ = pipeline.encode_prompt(
        captions, captions, device=pipeline.text_encoder.device
    )
    return {"text": text, "pooled": pooled}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text = conditions["text"]
    batch, _, height, width = noisy.shape
    guidance = None
    if pipeline.transformer.config.guidance_embeds:
        # of a recorded prediction, or that of training on pictures
        guidance = conditions.get("guidance")
        if guidance is None:
            guidance = torch.full((batch,), _GUIDANCE, device=noisy.device)
    packed = denoiser(
        **pack(noisy, text.dtype),
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled"],
        timestep=(timestep / _TIMESTEP_DIVISOR).to(text.dtype),
        txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=text.dtype),
        guidance=guidance,
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    return unpack(pipeline, packed, height * factor, width * factor)


# -- single files and LoRAs -------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    """Choose dev or schnell by the guidance layers; a dev model without them looks like schnell."""
    guidance, first = "guidance_in.in_layer", "img_in.weight"
    if file.is_diffusers:
        guidance, first = "time_text_embed.guidance_embedder.linear_1", "x_embedder.weight"
    name = "flux-dev" if f"{guidance}.weight" in file.shapes else "flux-schnell"
    width = file.size(first, 1)
    if width != 64:
        raise AfaError(
            "AFA-MODEL-005",
            f"'{file.source}' has {width} input channels instead of 64, which no bundled "
            "configuration of Flux describes. Name a diffusers folder of the same architecture: "
            "config=FOLDER.",
        )
    return name


def _variant(shapes: Shapes) -> str | None:
    if any(name.startswith("distilled_guidance_layer.") for name in shapes):
        return None  # Chroma, which has blocks of the same names
    if any(name.startswith("double_stream_modulation_img.") for name in shapes):
        return None  # FLUX.2, which has them as well
    if not any(
        name.startswith(("double_blocks.", "single_transformer_blocks.")) for name in shapes
    ):
        return None
    guidance = ("guidance_in.in_layer.", "time_text_embed.guidance_embedder.")
    has_guidance = any(name.startswith(guidance) for name in shapes)
    return "Flux with guidance (dev)" if has_guidance else "Flux without guidance (schnell)"


_FLUX = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    # XLabs, without `.processor`
    "proj_lora1": "attn.to_out.0",
    "proj_lora2": "attn.to_add_out",
    "qkv_lora1": "attn.to_q attn.to_k attn.to_v",
    "qkv_lora2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    # XLabs
    "proj": "proj_out",
    "qkv": "attn.to_q attn.to_k attn.to_v",
}


def flux_layer_names(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers with their names in the original code and in XLabs' code."""
    known = set(layers)
    yield from outside(_FLUX, known)
    yield from joined_blocks("double_blocks", "transformer_blocks", _FLUX_DOUBLE, known)
    yield from joined_blocks("single_blocks", "single_transformer_blocks", _FLUX_SINGLE, known)


_KIND = PipelineKind(
    name="Flux",
    pipelines=("FluxPipeline",),
    others=("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    flow_samplers=("euler", "unipc"),
    text=("text_encoder_2",),
    pooled=("text_encoder",),
    conditioning=Conditioning(_encode, _predict, unpack),
    carries_prompts=True,
    single_files=SingleFiles(
        configuration=_configuration,
        parts={
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.t5xxl.",),
            "vae": VAE_PREFIXES,
        },
        original=("double_blocks.",),
        diffusers=("x_embedder.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        common_names={"text_encoder": "CLIP-L", "text_encoder_2": "T5-XXL"},
        blocks={
            r"transformer_blocks\.\d+": "double blocks",
            r"single_transformer_blocks\.\d+": "single blocks",
        },
        written=lambda *_: {
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.t5xxl.transformer.",
            "vae": "vae.",
        },
        renamed={r"(query|key)_norm\.weight$": r"\1_norm.scale"},
        architectures={"flux-dev": "flux-1-dev", "flux-schnell": "flux-1-schnell"},
        gguf="flux",
    ),
    latent_channels=lambda config: config.in_channels // 4,
    patch=lambda _: 2,
    sample_size=128,
    shares_length=True,
    takes_negative=False,
)
FLUX = Family(
    name="flux",
    model_class=FluxTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=flux_blocks,
    layers=lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
    check=lambda model: require_blocks(model, _BLOCKS),
    example=flux_example,
    widths=joint_widths,
    split=_split,
    batches_guidance=False,
    timestep_divisor=_TIMESTEP_DIVISOR,
    grid=GRID,
    repeated_blocks=tuple(_BLOCKS.values()),
    original_blocks=("double_blocks", "single_blocks"),
    library_blocks=("single_transformer_blocks",),
    original_layers=flux_layer_names,
    canonical_config=fill_out_channels,
    variant=_variant,
    pipelines=(_KIND,),
)
