"""Which kind of model a checkpoint holds, in the words of people, told by its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES
from afa.denoisers.family import COMPONENTS
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
_INPAINTING = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}


def model_kind(tensors: Mapping[str, TensorSpec]) -> str | None:
    """The kind of model, such as `Stable Diffusion 1.x`; None where nothing is known of it.

    Args:
        tensors: by canonical name.
    """
    for start in (DENOISER, *(f"{component}." for component in COMPONENTS)):
        shapes = {n.removeprefix(start): t.shape for n, t in tensors.items() if n.startswith(start)}
        for family in FAMILIES:
            if (said := family.variant(shapes)) is not None:
                return said
    is_transformer = any(name.startswith((DENOISER, "transformer.")) for name in tensors)
    return "a transformer" if is_transformer else None


def refuse_mixed_kinds(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of several kinds of models.

    Raises:
        AfaError: names the first two kinds.
    """
    first, *others = [(c.source, model_kind(c.tensors)) for c in checkpoints]
    for source, kind in others:
        if kind != first[1]:
            raise AfaError(
                "AFA-MERGE-020",
                f"'{first[0]}' is {first[1] or 'of no known kind'}, '{source}' is "
                f"{kind or 'of no known kind'}. A merge needs models of one kind. Name checkpoints "
                "of one kind.",
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
                "AFA-MERGE-021",
                f"'{source}' reads {_channels(count)}, '{first.source}' reads {expected}. A merge "
                "has the input channels of the first expert, and can only add zeros to the others. "
                f"Name '{source}' first.",
            )
        raise AfaError(
            "AFA-MERGE-022",
            f"'{source}' reads {_channels(count)}, '{first.source}' reads {_channels(expected)}. A "
            f"merge needs the same extra channels, or none ({latent}). Name models of one use.",
        )
    return padded


def _channels(count: int) -> str:
    use = _INPAINTING.get(count)
    return f"{count} channels" + (f" ({use})" if use else "")
