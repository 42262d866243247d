"""Diffusers' `ChromaTransformer2DModel` as a coroutine: Chroma, made from Flux without guidance.

Chroma has the blocks of Flux, but one small network (the approximator) computes the modulation of
all blocks from the timestep, and a mask hides the padding of the text.

`chroma_blocks` reads like diffusers' own forward pass and calls its public submodules. If features
are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ChromaTransformer2DModel
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
from afa.denoisers.flux import flux_layer_names
from afa.denoisers.original_names import Rows
from afa.denoisers.splitting import split_text
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
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes
    from afa.denoisers.original_names import OriginalName

_BLOCKS = {
    "transformer_blocks": "ChromaTransformerBlock",
    "single_transformer_blocks": "ChromaSingleTransformerBlock",
}
#: `ChromaPipeline` divides timesteps by this, and the model multiplies by it again
_TIMESTEP_DIVISOR = 1000
#: vectors of the modulation (shift, scale and gate) of a stream in a double- and a single-stream
#: block, and of the output layer
_DOUBLE, _SINGLE, _OUT = 6, 3, 2
_APPROXIMATOR = "distilled_guidance_layer"


def chroma_blocks(
    transformer: ChromaTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    controlnet_single_block_samples: Sequence[Tensor] | None = None,
    controlnet_blocks_repeat: bool = False,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one Chroma transformer site by site.

    The sites are those of Flux, see `afa.denoisers.flux.flux_blocks`. The timestep embedding of the
    features is the mean of the modulation of all layers, which depends on nothing but the timestep.

    Args:
        hidden_states: packed noisy latent [B, H * W, C]; `img_ids` defines its grid.
        encoder_hidden_states: text embedding [B, L, D].
        timestep: [B], from 0 to 1.
        img_ids: position ids of the image tokens [H * W, 3].
        txt_ids: position ids of the text tokens [L, 3].
        attention_mask: mask of the text and image tokens [B, L + H * W], 1 keeps.
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
    time = transformer.time_text_embed(timestep.to(hidden.dtype) * _TIMESTEP_DIVISOR)
    modulation = transformer.distilled_guidance_layer(time)
    text = transformer.context_embedder(encoder_hidden_states)
    image_rows = _SINGLE * len(transformer.single_transformer_blocks)
    text_rows = image_rows + _DOUBLE * len(transformer.transformer_blocks)

    def run(block: nn.Module, temb: Tensor, **streams: Tensor) -> Any:
        return execution.run(
            block,
            **streams,
            temb=temb,
            image_rotary_emb=rotary,
            attention_mask=attention_mask,
            joint_attention_kwargs=attention_kwargs,
        )

    def double(block: nn.Module, k: int, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        starts = (image_rows + _DOUBLE * k, text_rows + _DOUBLE * k)
        temb = torch.cat([modulation[:, start : start + _DOUBLE] for start in starts], dim=1)
        return run(block, temb, hidden_states=hidden, encoder_hidden_states=text)

    def single(block: nn.Module, k: int, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        temb = modulation[:, _SINGLE * k : _SINGLE * (k + 1)]
        both = run(block, temb, hidden_states=torch.cat([text, hidden], dim=1))
        return both[:, : text.shape[1]], both[:, text.shape[1] :]

    def output(hidden: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(hidden, modulation[:, -_OUT:]))

    residuals = Residuals(
        controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
    )
    return (
        yield from two_stream_blocks(
            transformer,
            hidden,
            text,
            modulation.mean(1),
            size,
            double=double,
            single=single,
            output=output,
            residuals=residuals,
            execution=execution,
        )
    )


def chroma_example(transformer: ChromaTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    return {
        "hidden_states": torch.empty(1, 4, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_ids": torch.empty(4, len(config.axes_dims_rope), device="meta"),
        "txt_ids": torch.empty(1, len(config.axes_dims_rope), device="meta"),
        "attention_mask": torch.empty(1, 5, device="meta"),
    }


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, _, mask, *_ = pipeline.encode_prompt(
        captions, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return {"text": text, "mask": mask}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    text = conditions["text"]
    batch, _, height, width = noisy.shape
    latents = pack(noisy, text.dtype)
    count = latents["hidden_states"].shape[1]
    mask = pipeline._prepare_attention_mask(batch, count, text.dtype, conditions["mask"])
    packed = denoiser(
        **latents,
        encoder_hidden_states=text,
        timestep=(timestep / _TIMESTEP_DIVISOR).to(text.dtype),
        txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=text.dtype),
        attention_mask=mask,
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    return unpack(pipeline, packed, height * factor, width * factor)


# -- single files and LoRAs -------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    first = "x_embedder.weight" if file.is_diffusers else "img_in.weight"
    width = file.size(first, 1)
    if width != 64:
        raise AfaError(
            "AFA-MODEL-021",
            f"'{file.source}' has {width} input channels instead of 64, which no bundled "
            "configuration of Chroma describes. Models that draw pixels (Chroma1-Radiance) are "
            "not supported. For another Chroma, name a diffusers folder: config=FOLDER.",
        )
    return "chroma"


def _variant(shapes: Shapes) -> str | None:
    is_chroma = any(name.startswith(f"{_APPROXIMATOR}.") for name in shapes)
    return "Chroma" if is_chroma else None


def chroma_layer_names(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers with their names in the original code."""
    yield from flux_layer_names(layers)
    for layer in layers:
        place, _, last = layer.rpartition(".")
        if place.startswith(f"{_APPROXIMATOR}.layers.") and last in ("linear_1", "linear_2"):
            other = "in_layer" if last == "linear_1" else "out_layer"
            yield f"{place}.{other}", (Rows(layer),)


_KIND = PipelineKind(
    name="Chroma",
    pipelines=("ChromaPipeline",),
    others=("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    flow_samplers=("euler", "unipc"),
    unusable=("ChromaInpaintPipeline",),  # it reads an entry that Chroma's configuration lacks
    text=("text_encoder",),
    conditioning=Conditioning(_encode, _predict, unpack),
    carries_prompts=True,
    single_files=SingleFiles(
        configuration=_configuration,
        parts={"text_encoder": ("text_encoders.t5xxl.",), "vae": VAE_PREFIXES},
        original=("double_blocks.", f"{_APPROXIMATOR}."),
        diffusers=(
            "x_embedder.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            f"{_APPROXIMATOR}.in_proj.weight",
        ),
        common_names={"text_encoder": "T5-XXL"},
        blocks={
            r"transformer_blocks\.\d+": "double blocks",
            r"single_transformer_blocks\.\d+": "single blocks",
        },
        written=lambda *_: {"text_encoder": "text_encoders.t5xxl.transformer.", "vae": "vae."},
        renamed={
            r"(query|key)_norm\.weight$": r"\1_norm.scale",
            rf"^({_APPROXIMATOR}\.norms\.\d+)\.weight$": r"\1.scale",
        },
    ),
    latent_channels=lambda config: config.in_channels // 4,
    patch=lambda _: 2,
    sample_size=128,
)
CHROMA = Family(
    name="chroma",
    model_class=ChromaTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=chroma_blocks,
    layers=lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
    check=lambda model: require_blocks(model, _BLOCKS),
    example=chroma_example,
    widths=lambda model: Widths((model.config.joint_attention_dim,)),
    split=lambda _, *given: split_text(*given),
    text_mask="attention_mask",
    batches_guidance=False,
    timestep_divisor=_TIMESTEP_DIVISOR,
    grid=GRID,
    repeated_blocks=tuple(_BLOCKS.values()),
    original_blocks=(_APPROXIMATOR,),
    original_layers=chroma_layer_names,
    canonical_config=fill_out_channels,
    variant=_variant,
    pipelines=(_KIND,),
)
