"""Which kind of model a checkpoint holds, in the words of people, told by its tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.loading.single_file.canonical_names import DENOISER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from afa.merging.checkpoints import Checkpoint
    from afa.merging.streams import TensorSpec

#: the layer that reads the latent, under its canonical names; channels are its second dimension
INPUT_LAYERS = (f"{DENOISER}input_blocks.0.0.weight", "unet.conv_in.weight")
# its copy in the average that training code keeps
_AVERAGED_INPUT = "model_ema.diffusion_modelinput_blocks00weight"
_OUTPUT_LAYERS = (f"{DENOISER}out.2.weight", "unet.conv_out.weight")
_POOLED = (f"{DENOISER}label_emb.0.0.weight", "unet.add_embedding.linear_1.weight")
_CONTEXT = re.compile(r"(model\.diffusion_model|unet)\..*\.attn2\.to_k\.weight")
_KNOWN = {
    (False, 768): "Stable Diffusion 1.x",
    (False, 1024): "Stable Diffusion 2.x",
    (True, 2048): "Stable Diffusion XL",
    (True, 1280): "Stable Diffusion XL refiner",
}
_INPAINTING = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}


def model_kind(tensors: Mapping[str, TensorSpec]) -> str | None:
    """The kind of model, such as `Stable Diffusion 1.x`; None where nothing is known of it.

    Args:
        tensors: by canonical name.
    """
    if any(name in tensors for name in INPUT_LAYERS):
        return _unet_kind(tensors)
    original = {n.removeprefix(DENOISER) for n in tensors if n.startswith(DENOISER)}
    diffusers = {n.removeprefix("transformer.") for n in tensors if n.startswith("transformer.")}
    if any(name.startswith("distilled_guidance_layer.") for name in original | diffusers):
        return "Chroma"
    if any(name.startswith("double_blocks.") for name in original):
        return _flux_kind("guidance_in.in_layer.weight" in original)
    if any(name.startswith("joint_blocks.") for name in original):
        return f"Stable Diffusion 3 ({_num_blocks(original, 'joint_blocks')} blocks)"
    if any(name.startswith("single_transformer_blocks.") for name in diffusers):
        marks = (name.startswith("time_text_embed.guidance_embedder.") for name in diffusers)
        return _flux_kind(any(marks))
    if any(name.startswith("time_text_embed.") for name in diffusers):
        return f"Stable Diffusion 3 ({_num_blocks(diffusers, 'transformer_blocks')} blocks)"
    if any(name.startswith("adaln_single.") for name in diffusers):
        return "PixArt"
    return "a transformer" if diffusers or original else None


def _unet_kind(tensors: Mapping[str, TensorSpec]) -> str:
    """By the width of the text that it reads, and whether it reads a pooled one besides."""
    widths = [spec.shape[1] for name, spec in tensors.items() if _CONTEXT.fullmatch(name)]
    is_pooled, width = any(name in tensors for name in _POOLED), max(widths, default=0)
    family = "Stable Diffusion XL" if is_pooled else "Stable Diffusion"
    return _KNOWN.get((is_pooled, width), f"{family} with text of width {width}")


def _flux_kind(has_guidance: bool) -> str:
    return "Flux with guidance (dev)" if has_guidance else "Flux without guidance (schnell)"


def _num_blocks(names: set[str], root: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{root}.")})


def refuse_mixed_kinds(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of several kinds of models.

    Raises:
        AfaError: names the first two kinds.
    """
    first, *others = [(c.source, model_kind(c.tensors)) for c in checkpoints]
    for source, kind in others:
        if kind != first[1]:
            raise AfaError(
                f"'{first[0]}' is {first[1] or 'of no known kind'}, '{source}' is "
                f"{kind or 'of no known kind'}. A merge needs models of one kind. Name checkpoints "
                "of one kind."
            )


def is_input_layer(name: str) -> bool:
    """Whether it is the layer that reads the latent, or its average."""
    return name in (*INPUT_LAYERS, _AVERAGED_INPUT)


def check_channels(checkpoints: Sequence[Checkpoint]) -> dict[str, int]:
    """See how many input channels each U-Net reads; those of inpainting models read more.

    Returns: source -> channels, of the checkpoints whose input layer is to be padded with zeros to
        as many channels as the first one has.

    Raises:
        AfaError: the first has fewer channels than another, or the others have channels besides
            the latent's that are not the first one's.
    """
    counts = {}
    for each in checkpoints:
        layer = next((name for name in INPUT_LAYERS if name in each.tensors), None)
        if layer is not None and len(each.tensors[layer].shape) == 4:
            counts[each.source] = each.tensors[layer].shape[1]
    first = checkpoints[0]
    expected = counts.get(first.source)
    if expected is None:
        return {}
    output = next((first.tensors[n] for n in _OUTPUT_LAYERS if n in first.tensors), None)
    latent = output.shape[0] if output is not None else expected
    padded = {source: count for source, count in counts.items() if count != expected}
    for source, count in padded.items():
        if count == latent < expected:
            continue
        if expected == latent < count:
            raise AfaError(
                f"'{source}' reads {_channels(count)}, '{first.source}' reads {expected}. A merge "
                "has the input channels of the first expert, and can only add zeros to the others. "
                f"Name '{source}' first."
            )
        raise AfaError(
            f"'{source}' reads {_channels(count)}, '{first.source}' reads {_channels(expected)}. A "
            f"merge needs the same extra channels, or none ({latent}). Name models of one use."
        )
    return padded


def _channels(count: int) -> str:
    use = _INPAINTING.get(count)
    return f"{count} channels" + (f" ({use})" if use else "")
