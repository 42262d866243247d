"""Diffusers' `Flux2Transformer2DModel` as a coroutine: FLUX.2 klein.

`flux2_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers.autoencoders import autoencoder_of
from afa.denoisers.coroutine import Blocks
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import (
    Conditioning,
    Family,
    FileDenoiser,
    PipelineKind,
    SingleFiles,
    Widths,
)
from afa.denoisers.original_names import joined_blocks, outside
from afa.denoisers.prompt import once_per_prompt
from afa.denoisers.splitting import split_text
from afa.denoisers.tokens import fill_out_channels, grid_of, require_blocks
from afa.denoisers.two_streams import own_attention_kwargs, two_stream_blocks
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes
    from afa.denoisers.original_names import OriginalName

_BLOCKS = {
    "transformer_blocks": "Flux2TransformerBlock",
    "single_transformer_blocks": "Flux2SingleTransformerBlock",
}
#: `Flux2KleinPipeline` divides timesteps by this, and the model multiplies by it again
_TIMESTEP_DIVISOR = 1000


def flux2_blocks(
    transformer: Flux2Transformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    kv_cache: Any = None,
    kv_cache_mode: str | None = None,
    num_ref_tokens: int = 0,
    ref_fixed_timestep: float = 0.0,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one FLUX.2 transformer site by site.

    The sites are those of Flux, see `afa.denoisers.flux.flux_blocks`.

    Args:
        hidden_states: packed noisy latent [B, H * W, C]; `img_ids` defines its grid.
        encoder_hidden_states: text embedding [B, L, D].
        timestep: [B], from 0 to 1.
        img_ids: position ids of the image tokens [H * W, 4], or with a batch axis.
        txt_ids: position ids of the text tokens [L, 4], or with a batch axis.
        guidance: the guidance scale [B], for guidance-distilled models.
        joint_attention_kwargs: arguments of the attention processors.
        kv_cache: must be None, as reference images are not supported.
        kv_cache_mode: must be None.
        num_ref_tokens: has no effect.
        ref_fixed_timestep: has no effect.

    Yields: features [B, C, H, W] of the image and [B, C, L, 1] of the text.

    Returns: the packed prediction [B, H * W, C].

    Raises:
        AfaError: if `joint_attention_kwargs` has a LoRA `scale`, which only the ensemble can apply;
            the image tokens do not fill one rectangle; or keys of reference images are cached.
    """
    del num_ref_tokens, ref_fixed_timestep
    if kv_cache is not None or kv_cache_mode is not None:
        raise AfaError(
            "AFA-MODEL-028",
            f"The call caches keys of reference images (kv_cache_mode = {kv_cache_mode}). An "
            "ensemble of FLUX.2 draws from a prompt alone. Use Flux2KleinPipeline.",
        )
    attention_kwargs = own_attention_kwargs(joint_attention_kwargs)
    positions = img_ids
    img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
    # cached, because reading the positions makes the CPU wait for the GPU; without the layer
    size = once_per_prompt(positions, grid_of, lambda: grid_of(img_ids[:, :3]))

    time = timestep.to(hidden_states.dtype) * _TIMESTEP_DIVISOR
    guided = None if guidance is None else guidance.to(hidden_states.dtype) * 1000
    temb = transformer.time_guidance_embed(time, guided)
    of_image = transformer.double_stream_modulation_img(temb)
    of_text = transformer.double_stream_modulation_txt(temb)
    of_both = transformer.single_stream_modulation(temb)
    hidden = transformer.x_embedder(hidden_states)
    text = transformer.context_embedder(encoder_hidden_states)
    embedded = [transformer.pos_embed(ids) for ids in (txt_ids, img_ids)]
    rotary = tuple(torch.cat(both, dim=0) for both in zip(*embedded, strict=True))

    def run(block: nn.Module, hidden: Tensor, text: Tensor, **modulation: Any) -> Any:
        return execution.run(
            block,
            hidden_states=hidden,
            encoder_hidden_states=text,
            image_rotary_emb=rotary,
            joint_attention_kwargs=attention_kwargs,
            **modulation,
        )

    def double(block: nn.Module, _: int, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return run(block, hidden, text, temb_mod_img=of_image, temb_mod_txt=of_text)

    def single(block: nn.Module, _: int, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return run(block, hidden, text, temb_mod=of_both, split_hidden_states=True)

    def output(hidden: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(hidden, temb))

    return (
        yield from two_stream_blocks(
            transformer,
            hidden,
            text,
            temb,
            size,
            double=double,
            single=single,
            output=output,
            execution=execution,
        )
    )


def flux2_example(transformer: Flux2Transformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    example = {
        "hidden_states": torch.empty(1, 4, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_ids": torch.empty(4, len(config.axes_dims_rope), device="meta"),
        "txt_ids": torch.empty(1, len(config.axes_dims_rope), device="meta"),
    }
    if config.guidance_embeds:
        example["guidance"] = torch.empty(1, device="meta")
    return example


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _ = pipeline.encode_prompt(captions, pipeline.text_encoder.device)
    return {"text": text}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text, device = conditions["text"], noisy.device
    packed = denoiser(
        hidden_states=pipeline._pack_latents(noisy.to(text.dtype)),
        encoder_hidden_states=text,
        timestep=(timestep / _TIMESTEP_DIVISOR).to(text.dtype),
        img_ids=pipeline._prepare_latent_ids(noisy).to(device),
        txt_ids=pipeline._prepare_text_ids(text).to(device),
        return_dict=False,
    )[0]
    return packed.movedim(1, 2).unflatten(2, noisy.shape[-2:])


def _unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Convert packed latents [B, L, D], or those that the pipeline returns, to [B, D, H, W]."""
    vae, side = pipeline.vae, 2 * pipeline.vae_scale_factor
    if latents.ndim == 3:
        return latents.movedim(1, 2).unflatten(2, (height // side, width // side))
    known = autoencoder_of(vae)
    return known.scaled(vae, known.packed(latents))


# -- single files and LoRAs -------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    raise AfaError(
        "AFA-MODEL-029",
        f"'{file.source}' is a FLUX.2, for which no configuration is bundled, because its "
        "tokenizer is not. Name a diffusers folder of the same FLUX.2 klein: config=FOLDER. The "
        "weights of its transformer are not read. FLUX.2 dev is not supported.",
    )


def _variant(shapes: Shapes) -> str | None:
    is_flux2 = any(name.startswith("double_stream_modulation_img.") for name in shapes)
    return "FLUX.2" if is_flux2 else None


_OUTSIDE = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def flux2_layer_names(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers with their names in the original code."""
    known = set(layers)
    yield from outside(_OUTSIDE, known)
    yield from joined_blocks("double_blocks", "transformer_blocks", _DOUBLE, known)
    yield from joined_blocks("single_blocks", "single_transformer_blocks", _SINGLE, known)


_KIND = PipelineKind(
    name="FLUX.2 klein",
    pipelines=("Flux2KleinPipeline",),
    others=("Flux2KleinInpaintPipeline",),
    flow_samplers=("euler", "unipc"),
    unusable=("Flux2KleinInpaintPipeline",),  # it appends the picture to the image tokens
    text=("text_encoder",),
    text_layers=3,
    conditioning=Conditioning(_encode, _predict, _unpack),
    single_files=SingleFiles(
        configuration=_configuration,
        # files hold the transformer alone, and the others are read from folders
        parts={"text_encoder": (), "vae": ()},
        original=("double_blocks.", "double_stream_modulation_img.lin.weight"),
        diffusers=("x_embedder.weight", "double_stream_modulation_img.linear.weight"),
        common_names={"text_encoder": "Qwen3"},
        blocks={
            r"transformer_blocks\.\d+": "double blocks",
            r"single_transformer_blocks\.\d+": "single blocks",
        },
        renamed={r"(query|key)_norm\.weight$": r"\1_norm.scale"},
    ),
    patch=lambda _: 2,
    sample_size=128,
    prepare=lambda prompt: f"<|im_start|>user\n{prompt}<|im_end|>\n",
    takes_negative=False,
)
FLUX2 = Family(
    name="flux2",
    model_class=Flux2Transformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=flux2_blocks,
    layers=lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
    check=lambda model: require_blocks(model, _BLOCKS),
    example=flux2_example,
    widths=lambda model: Widths((model.config.joint_attention_dim,)),
    split=lambda _, *given: split_text(*given),
    batches_guidance=False,
    timestep_divisor=_TIMESTEP_DIVISOR,
    repeated_blocks=tuple(_BLOCKS.values()),
    original_blocks=("double_stream_modulation_img",),
    original_layers=flux2_layer_names,
    canonical_config=fill_out_channels,
    variant=_variant,
    pipelines=(_KIND,),
)
