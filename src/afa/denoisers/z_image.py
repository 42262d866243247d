"""Diffusers' `ZImageTransformer2DModel` as a coroutine: Z-Image and Z-Image-Turbo.

`z_image_blocks` reads like diffusers' own forward pass and calls its submodules. If features are
sent back unchanged, the result equals diffusers' output bit for bit.

The model takes and returns lists with one tensor per picture. Its time runs from 0 (noise) to 1,
and it predicts the velocity in that direction; the pipeline negates it. `_ZImage` converts its call
to tensors, with the timestep and the velocity of the scheduler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn.utils.rnn import pad_sequence

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
from afa.denoisers.interface import Interface
from afa.denoisers.original_names import Rows
from afa.denoisers.prompt import once_per_prompt
from afa.denoisers.splitting import split_text
from afa.denoisers.tokens import TEXT, require_blocks, to_column, to_grid, to_tokens
from afa.denoisers.two_streams import own_attention_kwargs
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from afa.denoisers.family import Conditions, Shapes
    from afa.denoisers.original_names import OriginalName

#: the pipeline passes (1000 - timestep) / 1000
_STEPS = 1000
#: the default of the pipeline's `max_sequence_length`
_LENGTH = 512
_DIGITS = 3  # decimals of a timestep that are kept when this is undone: 700.0, not 699.99994
_BLOCKS = dict.fromkeys(("noise_refiner", "context_refiner", "layers"), "ZImageTransformerBlock")


def z_image_blocks(
    transformer: ZImageTransformer2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    lengths: Sequence[int],
    t: Tensor,
    controlnet_block_samples: Mapping[int, Tensor] | None = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one Z-Image transformer site by site.

    Sites, in order: `embed`; `refiner.K` and `refiner.K.text` for the image and the text after each
    pair of refiners; `layer.K` and `layer.K.text` after each block, but without the text of the
    last one, which is not used; `out`, the prediction. See `afa.denoisers.flux.flux_blocks` for the
    text stream. The model pads the tokens of an image to a multiple of 32; padding is the start of
    the text stream. ControlNet residuals are added after a site.

    Args:
        hidden_states: noisy latent [B, C, H, W].
        timestep: not used; see `t`.
        encoder_hidden_states: text embedding [B, L, D], padded.
        encoder_attention_mask: not used; see `lengths`.
        lengths: the number of tokens of each text, B numbers up to L.
        t: the time [B], from 0 (noise) to 1.
        controlnet_block_samples: a ControlNet's residuals by the number of the block.
        patch_size: P, the side of a patch of the latent.
        f_patch_size: must be 1.
        joint_attention_kwargs: has no effect.

    Yields: features [B, C', H / P, W / P] of the image and [B, C', L', 1] of the text.

    Returns: the velocity [B, C, H, W] in the direction of the scheduler.

    Raises:
        AfaError: if `joint_attention_kwargs` has a LoRA `scale`, which only the ensemble can apply.
    """
    del timestep, encoder_attention_mask
    own_attention_kwargs(joint_attention_kwargs)
    device, key = hidden_states.device, f"{patch_size}-{f_patch_size}"
    height, width = (side // patch_size for side in hidden_states.shape[-2:])
    num_tokens = height * width

    temb = transformer.t_embedder(t * transformer.t_scale).type_as(hidden_states)
    images = list(hidden_states.unsqueeze(2).unbind(0))
    texts = [own[:length] for own, length in zip(encoder_hidden_states, lengths, strict=True)]
    images, texts, sizes, image_ids, text_ids, image_pads, text_pads = (
        transformer.patchify_and_embed(images, texts, patch_size, f_patch_size)
    )
    image_lengths, text_lengths = [len(own) for own in images], [len(own) for own in texts]
    image = transformer.all_x_embedder[key](torch.cat(images))
    image, image_rotary, image_mask, _, _ = transformer._prepare_sequence(
        list(image.split(image_lengths)),
        image_ids,
        image_pads,
        transformer.x_pad_token,
        None,
        device,
    )
    text = transformer.cap_embedder(torch.cat(texts))
    text, text_rotary, text_mask, _, _ = transformer._prepare_sequence(
        list(text.split(text_lengths)), text_ids, text_pads, transformer.cap_pad_token, None, device
    )
    _, rotary, mask, _ = transformer._build_unified_sequence(
        *(image, image_rotary, image_lengths, None, text, text_rotary, text_lengths, None),
        *(None, None, None, None, False, device),
    )
    num_padding = image.shape[1] - num_tokens
    hidden, rest = image[:, :num_tokens], torch.cat([image[:, num_tokens:], text], dim=1)

    def refine(blocks: Sequence[nn.Module], hidden: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        noise, context = blocks
        image = torch.cat([hidden, rest[:, :num_padding]], dim=1)
        image = execution.run(noise, image, image_mask, image_rotary, temb)
        text = execution.run(context, rest[:, num_padding:], text_mask, text_rotary)
        return torch.cat([image[:, num_tokens:], text], dim=1), image[:, :num_tokens]

    def layer(block: nn.Module, hidden: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        both = execution.run(block, torch.cat([hidden, rest], dim=1), mask, rotary, temb)
        return both[:, num_tokens:], both[:, :num_tokens]

    def segment(site: str, *inputs: Any) -> Any:
        return execution.segment(site, *inputs) or (None, None)

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))
    refiners = zip(transformer.noise_refiner, transformer.context_refiner, strict=True)
    for k, blocks in enumerate(refiners):
        site = f"refiner.{k}"
        rest, hidden = segment(site, refine, blocks, hidden, rest)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        rest = to_tokens((yield Feature(f"{site}{TEXT}", to_column(rest), temb)))
    if mask is not None:  # zeros after the shorter texts
        rest = rest.masked_fill(~mask[:, num_tokens:, None], 0)
    last = len(transformer.layers) - 1
    for k, block in enumerate(transformer.layers):
        site = f"layer.{k}"
        rest, hidden = segment(site, layer, block, hidden, rest)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        if k < last:
            rest = to_tokens((yield Feature(f"{site}{TEXT}", to_column(rest), temb)))
        if controlnet_block_samples is not None and k in controlnet_block_samples:
            hidden = hidden + controlnet_block_samples[k][:, :num_tokens]
            if rest is not None:
                rest = rest + controlnet_block_samples[k][:, num_tokens:]

    def output(hidden: Tensor, rest: Tensor | None) -> Tensor:
        # with the text, because a matrix product of fewer rows may round differently
        tokens = hidden if rest is None else torch.cat([hidden, rest], dim=1)
        tokens = transformer.all_final_layer[key](tokens, c=temb)
        latents = transformer.unpatchify(list(tokens.unbind(0)), sizes, patch_size, f_patch_size)
        return -torch.stack(latents).squeeze(2)

    return (yield Feature("out", execution.segment("out", output, hidden, rest), temb))


class _ZImage(Interface):
    """The call of Z-Image: lists of tensors, reversed time and the velocity in its direction."""

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Convert to the arguments of `z_image_blocks`.

        Raises:
            AfaError: if the pictures differ in size or have several frames, or if there are
                pictures besides the noisy one (Z-Image-Omni).
        """
        given = {key: value for key, value in given.items() if value is not None}
        images, texts, time = given.pop("x"), given.pop("cap_feats"), given.pop("t")
        if isinstance(images[0], list) or {"siglip_feats", "image_noise_mask"} & given.keys():
            raise _omni("The call has pictures besides the noisy one")
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1 or next(iter(shapes))[1] != 1:
            raise AfaError(
                "AFA-MODEL-023",
                "All noisy latents of a batch must have one size and one frame, [C, 1, H, W]; got "
                f"{', '.join(map(str, sorted(shapes)))}. Draw pictures of each size separately.",
            )
        latents = torch.stack(list(images)).squeeze(2)
        time = torch.as_tensor(time, device=latents.device)
        text, mask = _padded(texts)
        return {
            "hidden_states": latents,
            "timestep": (_STEPS * (1 - time.float())).round(decimals=_DIGITS),
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "lengths": tuple(map(len, texts)),
            "t": time,
            **given,
        }

    def output(self, prediction: Tensor) -> list[Tensor]:
        """Convert a velocity [B, C, H, W] to a list of [C, 1, H, W] in the model's direction."""
        return list((-prediction).unsqueeze(2).unbind(0))

    def prediction(self, output: Any) -> Tensor:
        """Convert the model's output to the velocity [B, C, H, W]."""
        return -torch.stack(list(output)).squeeze(2)


def _padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad texts to [B, L, D]; return them with their mask [B, L]. Both are the same in a loop."""
    first, others = texts[0], [text for text in texts[1:] if text is not texts[0]]

    def pad() -> tuple[Tensor, Tensor, list[Tensor]]:
        ones = [text.new_ones(len(text)) for text in texts]
        # the others are kept as long as the first, so that no other tensor can have their identity
        return pad_sequence(list(texts), True), pad_sequence(ones, True), others

    versions = [0 if text.is_inference() else text._version for text in texts]
    key = ("padded", *(id(text) for text in texts), *versions)
    text, mask, _ = once_per_prompt(first, key, pad)
    return text, mask


def z_image_example(transformer: ZImageTransformer2DModel) -> dict[str, Any]:
    """The smallest complete arguments of `z_image_blocks`, on the meta device."""
    config = transformer.config
    side = config.all_patch_size[0] * 2
    return {
        "hidden_states": torch.empty(1, config.in_channels, side, side, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.cap_feat_dim, device="meta"),
        "encoder_attention_mask": torch.empty(1, 1, device="meta"),
        "lengths": (1,),
        "t": torch.empty(1, device="meta"),
        "patch_size": config.all_patch_size[0],
        "f_patch_size": config.all_f_patch_size[0],
    }


def _check(transformer: ZImageTransformer2DModel) -> None:
    require_blocks(transformer, _BLOCKS)
    if transformer.config.siglip_feat_dim is not None:
        raise _omni("The model has layers for other pictures (siglip_feat_dim)")


def _omni(what: str) -> AfaError:
    return AfaError(
        "AFA-MODEL-022",
        f"{what}, which only Z-Image-Omni has. An ensemble supports Z-Image and Z-Image-Turbo. Use "
        "checkpoints of these.",
    )


# -- pipelines --------------------------------------------------------------------------------


def _as_message(prompt: str) -> str:
    """The prompt as a message to Qwen3, as the pipeline writes it with the published tokenizer."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    texts, _ = pipeline.encode_prompt(
        list(captions), pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return {
        "text": _to_full_length(texts),
        "mask": _to_full_length([text.new_ones(len(text)) for text in texts]),
    }


def _to_full_length(texts: Sequence[Tensor]) -> Tensor:
    """Pad texts to one length, because batches of a cache are made of several batches."""
    longest = texts[0].new_zeros(_LENGTH, *texts[0].shape[1:])
    return pad_sequence([*texts, longest], True)[:-1]


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Conditions
) -> Tensor:
    del pipeline
    text, mask = conditions["text"], conditions["mask"].bool()
    predicted = denoiser(
        list(noisy.to(text.dtype).unsqueeze(2).unbind(0)),
        (_STEPS - timestep) / _STEPS,
        [own[keep] for own, keep in zip(text, mask, strict=True)],
        return_dict=False,
    )[0]
    return _INTERFACE.prediction(predicted)


# -- single files and LoRAs -------------------------------------------------------------------


def _configuration(file: FileDenoiser) -> str:
    raise AfaError(
        "AFA-MODEL-024",
        f"'{file.source}' is a Z-Image, for which no configuration is bundled, because its "
        "tokenizer is not. Name a diffusers folder of the same model: config=FOLDER. Its weights "
        "are not read.",
    )


def _variant(shapes: Shapes) -> str | None:
    is_z_image = "cap_pad_token" in shapes and any(n.startswith("noise_refiner.") for n in shapes)
    return "Z-Image" if is_z_image else None


_PLACES = {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.": "final_layer."}
_ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}


def z_image_layer_names(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers that have other names in the original code, with these names."""
    for layer in layers:
        place, attention, last = layer.partition(".attention.")
        if last == "to_q":
            yield f"{place}.attention.qkv", tuple(Rows(f"{place}.attention.to_{n}") for n in "qkv")
        elif attention and last in _ATTENTION:
            yield f"{place}.attention.{_ATTENTION[last]}", (Rows(layer),)
        for ours, theirs in _PLACES.items():
            if layer.startswith(ours):
                yield theirs + layer.removeprefix(ours), (Rows(layer),)


_INTERFACE = _ZImage()
_KIND = PipelineKind(
    name="Z-Image",
    pipelines=("ZImagePipeline",),
    others=("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    flow_samplers=("euler",),
    text=("text_encoder",),
    conditioning=Conditioning(_encode, _predict),
    single_files=SingleFiles(
        configuration=_configuration,
        parts={"text_encoder": ("text_encoders.qwen3_4b.",), "vae": VAE_PREFIXES},
        original=("layers.0.adaLN_modulation.0.weight", "layers.0.attention.qkv.weight"),
        diffusers=("layers.0.adaLN_modulation.0.weight", "layers.0.attention.to_q.weight"),
        common_names={"text_encoder": "Qwen3-4B"},
        blocks={r"layers\.\d+": "blocks", r"(noise|context)_refiner\.\d+": "refiners"},
        written=lambda *_: {"text_encoder": "text_encoders.qwen3_4b.transformer.", "vae": "vae."},
    ),
    patch=lambda config: config["all_patch_size"][0],
    sample_size=128,
    prepare=_as_message,
    # the pipeline adds guidance_scale times the difference to the prediction with the prompt
    guide=lambda guidance: {"guidance_scale": max(guidance - 1.0, 0.0)},
)
Z_IMAGE = Family(
    name="z_image",
    model_class=ZImageTransformer2DModel,
    output_class=Transformer2DModelOutput,
    blocks=z_image_blocks,
    layers=lambda model: [*model.noise_refiner, *model.context_refiner, *model.layers],
    check=_check,
    example=z_image_example,
    widths=lambda model: Widths((model.config.cap_feat_dim,)),
    split=lambda _, *given: split_text(*given),
    attributes=("in_channels",),
    text_mask="encoder_attention_mask",
    prompt_first=True,
    repeated_blocks=("ZImageTransformerBlock",),
    original_blocks=("noise_refiner",),
    library_blocks=("all_x_embedder",),
    original_layers=z_image_layer_names,
    variant=_variant,
    pipelines=(_KIND,),
    interface=_INTERFACE,
)
