"""Diffusers' `SD3Transformer2DModel` as a coroutine: Stable Diffusion 3 and 3.5.

`sd3_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn import functional

from afa.denoisers.coroutine import Blocks, Feature
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
from afa.denoisers.flux import joint_widths
from afa.denoisers.original_names import Rows, depth, joined_blocks, outside
from afa.denoisers.splitting import split_joined, split_pooled
from afa.denoisers.tokens import (
    TEXT,
    fill_out_channels,
    require_blocks,
    to_column,
    to_grid,
    to_tokens,
    unpatchify,
)
from afa.denoisers.two_streams import own_attention_kwargs
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes
    from afa.denoisers.original_names import OriginalName


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
    """Run one Stable Diffusion 3 transformer site by site.

    Sites, in order: `embed`; `block.K` and `block.K.text` for the image and text streams after each
    block, but without the text of the last one, which is not used; `out`, the prediction. See
    `flux_blocks` for the text stream. ControlNet residuals are added after a site.

    Args:
        hidden_states: noisy latent [B, C, H, W].
        encoder_hidden_states: text embedding [B, L, D].
        pooled_projections: pooled text embedding [B, D'].
        timestep: [B].
        block_controlnet_hidden_states: a ControlNet's residuals.
        joint_attention_kwargs: arguments of the attention processors; IP-Adapter images.
        skip_layers: numbers of blocks that do not run and have no sites (skip-layer guidance).

    Yields: features [B, C', H / P, W / P] of the image and [B, C', L, 1] of the text, where P is
        the patch size.

    Returns: the prediction [B, C, H, W].

    Raises:
        AfaError: if `joint_attention_kwargs` has a LoRA `scale`, which only the ensemble can apply.
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


def sd3_example(transformer: SD3Transformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    side = config.patch_size * 2
    return {
        "hidden_states": torch.empty(1, config.in_channels, side, side, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }


def _split(
    transformer: SD3Transformer2DModel,
    arguments: Mapping[str, Any],
    widths: Widths,
    count: int,
) -> list[dict[str, Any]]:
    """Split the joined text: CLIP tokens [encoder 1 of all | encoder 2 of all | 0], then T5's."""
    text, (width,) = arguments["encoder_hidden_states"], joint_widths(transformer).text
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


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        captions,
        captions,
        captions,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return {"text": text, "pooled": pooled}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text = conditions["text"]
    return denoiser(
        hidden_states=noisy.to(text.dtype),
        timestep=timestep,
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled"],
        return_dict=False,
    )[0]


# -- single files and LoRAs -------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    depth, positions = _depth(file.shapes), file.size("pos_embed", 1)
    if file.is_diffusers:
        positions = file.size("pos_embed.pos_embed", 1)
    known = {
        (24, 192**2): "stable-diffusion-3-medium",
        (24, 384**2): "stable-diffusion-3.5-medium",
        (38, 192**2): "stable-diffusion-3.5-large",
    }
    if (depth, positions) not in known:
        raise AfaError(
            "AFA-MODEL-008",
            f"'{file.source}' is a Stable Diffusion 3 with {depth} blocks and {positions} "
            "positions, which no bundled configuration describes. Name a diffusers folder of the "
            "same architecture: config=FOLDER.",
        )
    return known[depth, positions]


def _depth(names: Iterable[str]) -> int:
    """The number of blocks, from tensor names in either layout."""
    roots = ("joint_blocks.", "transformer_blocks.")
    return len({name.split(".")[1] for name in names if name.startswith(roots)})


def _variant(shapes: Shapes) -> str | None:
    if any(name.startswith("single_transformer_blocks.") for name in shapes):
        return None
    is_sd3 = any(name.startswith(("joint_blocks.", "time_text_embed.")) for name in shapes)
    return f"Stable Diffusion 3 ({_depth(shapes)} blocks)" if is_sd3 else None


_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SD3_JOINT = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def sd3_layer_names(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers with their names in the original code."""
    known = set(layers)
    yield from outside(_SD3, known)
    last = f"transformer_blocks.{depth('transformer_blocks', known) - 1}.norm1_context.linear"
    for name, rows in joined_blocks("joint_blocks", "transformer_blocks", _SD3_JOINT, known):
        # the context of the last block is not used further, so its modulation is a last one
        yield name, ((Rows(last, is_swapped=True),) if rows == (Rows(last),) else rows)


_CLIPS = ("text_encoder", "text_encoder_2")
_KIND = PipelineKind(
    name="Stable Diffusion 3",
    pipelines=("StableDiffusion3Pipeline",),
    others=("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    text=(*_CLIPS, "text_encoder_3"),
    pooled=_CLIPS,
    conditioning=Conditioning(_encode, _predict),
    single_files=SingleFiles(
        configuration=_configuration,
        parts={
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.clip_g.",),
            "text_encoder_3": ("text_encoders.t5xxl.",),
            "vae": VAE_PREFIXES,
        },
        original=("joint_blocks.",),
        diffusers=("pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        common_names={
            "text_encoder": "CLIP-L",
            "text_encoder_2": "CLIP-G",
            "text_encoder_3": "T5-XXL",
        },
        optional=frozenset({"text_encoder_3"}),
        blocks={r"transformer_blocks\.\d+": "blocks"},
        written=lambda *_: {
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer.",
            "vae": "first_stage_model.",
        },
        renamed={r"^pos_embed\.pos_embed$": "pos_embed"},
        gguf="sd3",
        architectures={
            "stable-diffusion-3-medium": "stable-diffusion-v3-medium",
            "stable-diffusion-3.5-medium": "stable-diffusion-v3.5-medium",
            "stable-diffusion-3.5-large": "stable-diffusion-v3.5-large",
        },
    ),
    max_latent=lambda config: (
        (config.get("pos_embed_max_size") or 96) * (config.get("patch_size") or 2)
    ),
    padded_text="joint_attention_dim",
    shares_length=True,
)
SD3 = Family(
    name="sd3",
    model_class=SD3Transformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=sd3_blocks,
    layers=lambda model: list(model.transformer_blocks),
    check=lambda model: require_blocks(model, {"transformer_blocks": "JointTransformerBlock"}),
    example=sd3_example,
    widths=joint_widths,
    split=_split,
    repeated_blocks=("JointTransformerBlock",),
    original_blocks=("joint_blocks",),
    original_layers=sd3_layer_names,
    canonical_config=fill_out_channels,
    variant=_variant,
    pipelines=(_KIND,),
)
