"""ComfyUI's `UNetModel` as a coroutine: Stable Diffusion 1.x, 2.x and XL.

Sites, names and shapes are those of `afa.denoisers.unet`, so aggregators trained with diffusers fit
and the other way round. If features are sent back unchanged, the result equals ComfyUI's forward
pass bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    UNetModel,
    apply_control,
    forward_timestep_embed,
    timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers import PLAIN, Blocks, Execution, Family, Feature, Widths
from afa.denoisers.splitting import split_joined
from afa.errors import AfaError

from .interface import WITHOUT_DATA, ComfyInterface, by_expert, own_control, own_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn


def unet_blocks(
    unet: UNetModel,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    y: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    transformer_options: Mapping[str, Any] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one U-Net site by site (AFA, section 3.2 and figure 2).

    Sites as in `afa.denoisers.unet.unet_blocks`. Residuals of ControlNets and T2I-Adapters are
    added, and patches of blocks are called, after a site, so aggregators see features like those in
    training.

    Args:
        sample: noisy latent [B, C, H, W].
        timestep: [B].
        encoder_hidden_states: text embedding [B, L, D], which ComfyUI calls `context`.
        y: pooled text embedding and size conditions [B, D'], for models with such an input.
        control: residuals of ControlNets, as ComfyUI passes them.
        transformer_options: patches and everything else that ComfyUI passes.

    Yields: the feature [B, C', H', W'] of each site; the fused one must be sent back.

    Returns: the prediction [B, C, H, W], which is the feature that was sent back at `conv_out`.
    """
    control, options = own_control(control), own_options(transformer_options)
    patches: Mapping[str, list[Any]] = options.get("patches", {})
    options["original_shape"] = list(sample.shape)
    num_attended = 0  # attention layers before the current block

    embedding = timestep_embedding(timestep, unet.model_channels, repeat_only=False)
    temb = unet.time_embed(embedding.to(sample.dtype))
    for patch in patches.get("emb_patch", ()):
        temb = patch(temb, unet.model_channels, options)
    if unet.num_classes is not None:
        temb = temb + unet.label_emb(y)

    def run(block: nn.Module, *hidden: Tensor, place: tuple[str, int], size: Any = None) -> Tensor:
        options["block"], options["transformer_index"] = place, num_attended
        joined = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
        return forward_timestep_embed(
            block, joined, temb, encoder_hidden_states, options, output_shape=size
        )

    skips: list[Tensor] = []
    hidden = sample
    for n, (site, block) in enumerate(zip(_input_sites(unet), unet.input_blocks, strict=True)):
        place = ("input", n)
        hidden = execution.segment(site, _at(run, place), block, hidden)
        hidden = yield Feature(site, hidden, temb)
        num_attended += _num_attentions(block)
        options["block"] = place
        hidden = _controlled(hidden, control, "input")
        if "input_block_patch" in patches or "input_block_patch_after_skip" in patches:
            hidden = hidden.clone()  # one that writes in place also changes the skip, as in ComfyUI
        for each in patches.get("input_block_patch", ()):
            hidden = each(hidden, options)
        skips.append(hidden)
        for each in patches.get("input_block_patch_after_skip", ()):
            hidden = each(hidden, options)

    if unet.middle_block is not None:
        hidden = execution.segment("mid", _at(run, ("middle", 0)), unet.middle_block, hidden)
        hidden = yield Feature("mid", hidden, temb)
        num_attended += _num_attentions(unet.middle_block)
    hidden = _controlled(hidden, control, "middle")

    for n, (site, block) in enumerate(zip(_output_sites(unet), unet.output_blocks, strict=True)):
        place = ("output", n)
        options["block"] = place
        skip = _controlled(skips.pop(), control, "output")
        if "output_block_patch" in patches:
            hidden, skip = hidden.clone(), skip.clone()  # FreeU writes to them
        for patch in patches.get("output_block_patch", ()):
            hidden, skip = patch(hidden, skip, options)
        size = skips[-1].shape if skips else None
        hidden = execution.segment(site, _at(run, place, size), block, hidden, skip)
        num_attended += _num_attentions(block)
        if skips:
            hidden = yield Feature(site, hidden, temb)

    def output(hidden: Tensor) -> Tensor:
        return unet.out(hidden.type(sample.dtype))

    return (yield Feature("conv_out", execution.segment("conv_out", output, hidden), temb))


def _at(run: Callable[..., Tensor], place: tuple[str, int], size: Any = None) -> Any:
    return lambda block, *hidden: run(block, *hidden, place=place, size=size)


def _controlled(hidden: Tensor, control: dict[str, list[Any]] | None, name: str) -> Tensor:
    if control is None or not control.get(name):
        return hidden
    return apply_control(hidden.clone(), control, name)


def _num_attentions(block: Any) -> int:
    return sum(isinstance(layer, SpatialTransformer) for layer in block)


def _input_sites(unet: UNetModel) -> Iterator[str]:
    yield "conv_in"
    for level, count in enumerate(unet.num_res_blocks):
        yield from (f"down.{level}.{n}" for n in range(count))
        if level < len(unet.num_res_blocks) - 1:
            yield f"down.{level}.downsample"


def _output_sites(unet: UNetModel) -> list[str]:
    """The sites of the output blocks; the last block is followed by the output layers' site."""
    levels = reversed(unet.num_res_blocks)
    sites = [f"up.{b}.{n}" for b, count in enumerate(levels) for n in range(count + 1)]
    return [*sites[:-1], "conv_out"]


def check_unet(unet: UNetModel) -> None:
    """Check that `unet_blocks` supports a U-Net.

    Raises:
        AfaError: if it is a model of videos, or one with another output.
    """
    reason = None
    if unet.default_num_video_frames is not None or unet.use_temporal_resblocks:
        reason = "draws videos"
    elif unet.predict_codebook_ids:
        reason = "predicts a codebook"
    elif unet.num_classes not in (None, "sequential"):
        reason = f"has classes ({unet.num_classes})"
    if reason is not None:
        raise AfaError(
            "AFA-COMFY-001",
            f"A U-Net that {reason} cannot be an expert. Use models of Stable Diffusion 1.x, 2.x "
            "or XL.",
        )


def _call(
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    y: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    transformer_options: Any = None,
) -> None:
    """The arguments of an ensemble's call; `transformer_options` may be a list of one by expert."""


def unet_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an ensemble's call from those of `UNetModel.forward`."""
    return {
        "sample": given["x"],
        "timestep": given["timesteps"],
        "encoder_hidden_states": given.get("context"),
        "y": given.get("y"),
        "control": given.get("control"),
        "transformer_options": given.get("transformer_options"),
    }


def unet_first(unet: UNetModel, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The texts and the conditions `y` of the first expert, from those of all."""
    found = dict(given)
    for key in ("c_crossattn", "crossattn_controlnet"):
        if (text := given.get(key)) is not None:
            found[key] = split_joined("text embedding", text, _widths(unet).text, count)[0]
    if (y := given.get("y")) is not None:
        found["y"] = _labels(y, _label_width(unet), count)[0]
    return found


def _example(unet: UNetModel) -> dict[str, Any]:
    # the smallest side that is halved without a remainder at every level
    side = 2 ** len(unet.num_res_blocks)
    example = {
        "sample": torch.empty(1, unet.in_channels, side, side, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if (width := _text_width(unet)) is not None:
        example["encoder_hidden_states"] = torch.empty(1, 1, width, device="meta")
    if unet.num_classes is not None:
        example["y"] = torch.empty(1, _label_width(unet), device="meta")
    tensors = {name: tensor.to(unet.dtype) for name, tensor in example.items()}
    return {**tensors, "transformer_options": WITHOUT_DATA}


def _text_width(unet: UNetModel) -> int | None:
    attentions = (m.attn2 for m in unet.modules() if isinstance(m, BasicTransformerBlock))
    return next((a.to_k.in_features for a in attentions if a is not None), None)


def _label_width(unet: UNetModel) -> int:
    return unet.label_emb[0][0].in_features


def _widths(unet: UNetModel) -> Widths:
    width = _text_width(unet)
    return Widths(() if width is None else (width,))


def _split(
    unet: UNetModel, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    options = by_expert(arguments.get("transformer_options"), count)
    per_expert = [{**arguments, "transformer_options": own} for own in options]
    if (text := arguments.get("encoder_hidden_states")) is not None:
        texts = split_joined("text embedding", text, widths.text, count)
        for own, part in zip(per_expert, texts, strict=True):
            own["encoder_hidden_states"] = part
    if (y := arguments.get("y")) is not None:
        for own, part in zip(per_expert, _labels(y, _label_width(unet), count), strict=True):
            own["y"] = part
    return per_expert


def _labels(y: Tensor, width: int, count: int) -> list[Tensor]:
    """Split pooled embeddings of all experts, followed by conditions that they share."""
    pooled, rest = divmod(y.shape[-1] - width, max(count - 1, 1))
    if rest or not 0 <= pooled <= width:
        raise AfaError(
            "AFA-COMFY-002",
            f"The pooled text embedding and size conditions must be {width} wide, or have one "
            f"pooled embedding for each of {count} experts; got {y.shape[-1]}. Use AFA Text "
            "Encode with the CLIP of every expert.",
        )
    if pooled == 0:
        return [y] * count
    shared = y[..., count * pooled :]
    return [torch.cat([own, shared], -1) for own in y[..., : count * pooled].chunk(count, -1)]


UNET = Family(
    name="comfy_unet",
    model_class=UNetModel,
    output_class=Transformer2DModelOutput,
    blocks=unet_blocks,
    layers=lambda unet: [*unet.input_blocks, unet.middle_block, *unet.output_blocks],
    check=check_unet,
    example=_example,
    widths=_widths,
    split=_split,
    is_residual=False,
    latent="sample",
    component="unet",
    interface=ComfyInterface(_call),
)
