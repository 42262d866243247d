"""Diffusers' `QwenImageTransformer2DModel` as a coroutine: Qwen-Image.

`qwen_image_blocks` reads like diffusers' own forward pass and calls its public submodules. If
features are sent back unchanged, the result equals diffusers' output bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import compute_text_seq_len_from_mask
from torch.nn.utils.rnn import pad_sequence

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import (
    Conditioning,
    Family,
    FileDenoiser,
    PipelineKind,
    SingleFiles,
    Widths,
)
from afa.denoisers.splitting import split_text
from afa.denoisers.tokens import TEXT, require_blocks, to_column, to_grid, to_tokens
from afa.denoisers.two_streams import interval, own_attention_kwargs, pack, unpack
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes

#: `QwenImagePipeline` divides timesteps by this
_TIMESTEP_DIVISOR = 1000
#: the default of the pipeline's `max_sequence_length`
_LENGTH = 512
#: what the pipeline's authors pass as a negative prompt if there is none
_NO_PROMPT = " "
#: entries of configurations that only models for editing and for layers set
_OTHER_TASKS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def qwen_image_blocks(
    transformer: QwenImageTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_shapes: Sequence[Any],
    encoder_hidden_states_mask: Tensor | None = None,
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    additional_t_cond: Tensor | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one Qwen-Image transformer site by site.

    Sites, in order: `embed`; `block.K` and `block.K.text` for the image and text streams after each
    block, but without the text of the last one, which is not used; `out`, the packed prediction.
    See `afa.denoisers.flux.flux_blocks` for the text stream. ControlNet residuals are added after a
    site.

    Args:
        hidden_states: packed noisy latent [B, H * W, C].
        encoder_hidden_states: text embedding [B, L, D].
        timestep: [B], from 0 to 1.
        img_shapes: for each picture, a list of the frames, height and width of its image in tokens,
            [(1, H, W)].
        encoder_hidden_states_mask: mask of the text [B, L], 1 keeps.
        guidance: the guidance scale [B], for guidance-distilled models.
        attention_kwargs: arguments of the attention processors.
        controlnet_block_samples: a ControlNet's residuals.
        additional_t_cond: must be None.

    Yields: features [B, C', H, W] of the image and [B, C', L, 1] of the text.

    Returns: the packed prediction [B, H * W, C].

    Raises:
        AfaError: if `attention_kwargs` has a LoRA `scale`, which only the ensemble can apply, or
            there are pictures besides the noisy one.
    """
    attention_kwargs = own_attention_kwargs(attention_kwargs)
    height, width = _size(img_shapes)
    if additional_t_cond is not None:
        raise _other_task("The call has additional_t_cond")

    hidden = transformer.img_in(hidden_states)
    time = timestep.to(hidden.dtype)
    text = transformer.txt_in(transformer.txt_norm(encoder_hidden_states))
    length, _, mask = compute_text_seq_len_from_mask(text, encoder_hidden_states_mask)
    guided = () if guidance is None else (guidance.to(hidden.dtype) * 1000,)
    temb = transformer.time_text_embed(time, *guided, hidden, None)
    rotary = transformer.pos_embed(img_shapes, max_txt_seq_len=length, device=hidden.device)

    def layer(block: nn.Module, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return execution.run(
            block,
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            temb=temb,
            image_rotary_emb=rotary,
            joint_attention_kwargs=attention_kwargs,
            modulate_index=None,
        )

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))

    blocks, residuals = transformer.transformer_blocks, controlnet_block_samples
    for k, block in enumerate(blocks):
        site = f"block.{k}"
        text, hidden = execution.segment(site, layer, block, hidden, text) or (None, None)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        if k < len(blocks) - 1:
            text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if residuals is not None:
            hidden = hidden + residuals[k // interval(blocks, residuals)]

    def output(hidden: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(hidden, temb))

    out = execution.segment("out", output, hidden)
    return to_tokens((yield Feature("out", to_grid(out, height, width), temb)))


def _size(img_shapes: Sequence[Any]) -> tuple[int, int]:
    """Height and width in tokens of the only image of each picture."""
    shapes = {tuple(map(tuple, of_one)) for of_one in img_shapes}
    first = next(iter(shapes))
    if len(shapes) > 1 or len(first) > 1 or first[0][0] != 1:
        raise _other_task(f"The call has images of the sizes {sorted(shapes)}")
    _, height, width = first[0]
    return height, width


def _check(transformer: QwenImageTransformer2DModel) -> None:
    require_blocks(transformer, {"transformer_blocks": "QwenImageTransformerBlock"})
    entry = next((name for name in _OTHER_TASKS if transformer.config.get(name)), None)
    if entry is not None:
        raise _other_task(f"The model's configuration has {entry}")


def _other_task(what: str) -> AfaError:
    return AfaError(
        "AFA-MODEL-025",
        f"{what}; an ensemble supports only Qwen-Image that draws one image of one size from a "
        "prompt. Models for editing (Qwen-Image-Edit) and for layers (Qwen-Image-Layered) cannot "
        "be experts.",
    )


def qwen_image_example(transformer: QwenImageTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of this transformer's forward pass, on the meta device."""
    config = transformer.config
    example = {
        "hidden_states": torch.empty(1, 4, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_shapes": [[(1, 2, 2)]],
    }
    if config.guidance_embeds:
        example["guidance"] = torch.empty(1, device="meta")
    return example


# -- pipelines --------------------------------------------------------------------------------


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    text, mask = pipeline.encode_prompt(
        [caption or _NO_PROMPT for caption in captions],
        pipeline.text_encoder.device,
        max_sequence_length=_LENGTH,
    )
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    return {"text": _to_full_length(text), "mask": _to_full_length(mask)}


def _to_full_length(texts: Tensor) -> Tensor:
    """Pad texts [B, L, ...] to one length, because batches of a cache are made of several."""
    longest = texts.new_zeros(_LENGTH, *texts.shape[2:])
    return pad_sequence([*texts, longest], True)[:-1]


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    mask = conditions["mask"].bool()
    longest = int(mask.sum(1).max())
    text, mask = conditions["text"][:, :longest], mask[:, :longest]
    batch, _, height, width = noisy.shape
    packed = denoiser(
        hidden_states=pack(noisy, text.dtype)["hidden_states"],
        encoder_hidden_states=text,
        encoder_hidden_states_mask=None if mask.all() else mask,
        timestep=(timestep / _TIMESTEP_DIVISOR).to(text.dtype),
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    return unpack(pipeline, packed, height * factor, width * factor)


# -- single files -----------------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    raise AfaError(
        "AFA-MODEL-026",
        f"'{file.source}' is a Qwen-Image, for which no configuration is bundled, because its "
        "tokenizer is not. Name a diffusers folder of the same model: config=FOLDER. The weights "
        "of its transformer are not read.",
    )


def _variant(shapes: Shapes) -> str | None:
    is_qwen = any(name.startswith("transformer_blocks.0.img_mod.") for name in shapes)
    return "Qwen-Image" if is_qwen else None


_KIND = PipelineKind(
    name="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    others=("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    flow_samplers=("euler", "unipc"),
    text=("text_encoder",),
    conditioning=Conditioning(_encode, _predict, unpack),
    single_files=SingleFiles(
        configuration=_configuration,
        # the original code has the names of diffusers
        diffusers=("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        original=("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        # files hold the transformer alone, and the others are read from folders
        parts={"text_encoder": (), "vae": ()},
        common_names={"text_encoder": "Qwen2.5-VL-7B"},
        blocks={r"transformer_blocks\.\d+": "blocks"},
    ),
    latent_channels=lambda config: config.in_channels // 4,
    patch=lambda _: 2,
    sample_size=128,
    call={"max_sequence_length": _LENGTH},
    guide=lambda guidance: {"true_cfg_scale": guidance},
    without_prompt=_NO_PROMPT,
)
QWEN_IMAGE = Family(
    name="qwen_image",
    model_class=QwenImageTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=qwen_image_blocks,
    layers=lambda model: list(model.transformer_blocks),
    check=_check,
    example=qwen_image_example,
    widths=lambda model: Widths((model.config.joint_attention_dim,)),
    split=lambda _, *given: split_text(*given),
    attention_kwargs="attention_kwargs",
    text_mask="encoder_hidden_states_mask",
    batches_guidance=False,
    timestep_divisor=_TIMESTEP_DIVISOR,
    repeated_blocks=("QwenImageTransformerBlock",),
    original_blocks=(),
    variant=_variant,
    pipelines=(_KIND,),
)
