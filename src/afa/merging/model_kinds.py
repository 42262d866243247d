"""Detect the kind of a checkpoint's model from its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES
from afa.denoisers.family import COMPONENTS
from afa.errors import AfaError
from afa.loading.single_file.canonical_names import DENOISER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from afa.loading.tensor_files import TensorSpec
    from afa.merging.checkpoints import Checkpoint

#: canonical names of the layer that reads the latent; dimension 1 is its input channels
INPUT_LAYERS = (f"{DENOISER}input_blocks.0.0.weight", "unet.conv_in.weight")
# its copy in the exponential moving average (EMA) of the weights
_AVERAGED_INPUT = "model_ema.diffusion_modelinput_blocks00weight"
_OUTPUT_LAYERS = (f"{DENOISER}out.2.weight", "unet.conv_out.weight")
_INPAINTING = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}


def model_kind(tensors: Mapping[str, TensorSpec]) -> str | None:
    """Detect the kind of model, such as `Stable Diffusion 1.x`; None if it is unknown.

    Args:
        tensors: canonical name -> tensor.
    """
    for prefix in (DENOISER, *(f"{component}." for component in COMPONENTS)):
        shapes = {
            n.removeprefix(prefix): t.shape for n, t in tensors.items() if n.startswith(prefix)
        }
        for family in FAMILIES:
            if (variant := family.variant(shapes)) is not None:
                return variant
    is_transformer = any(name.startswith((DENOISER, "transformer.")) for name in tensors)
    return "a transformer" if is_transformer else None


def refuse_mixed_kinds(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that all checkpoints are of one kind of model.

    Raises:
        AfaError: if not.
    """
    first, *others = [(c.source, model_kind(c.tensors)) for c in checkpoints]
    for source, kind in others:
        if kind != first[1]:
            raise AfaError(
                "AFA-MERGE-020",
                f"'{first[0]}' is {first[1] or 'of an unknown kind'}, '{source}' is "
                f"{kind or 'of an unknown kind'}. Merge models of one kind.",
            )


def is_input_layer(name: str) -> bool:
    """Whether it is the layer that reads the latent, or its moving average."""
    return name in (*INPUT_LAYERS, _AVERAGED_INPUT)


def check_channels(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that the input channels of all U-Nets can be merged; inpainting models have more.

    Raises:
        AfaError: if the first checkpoint has fewer channels than another, or another one has other
            channels besides the latent's.
    """
    counts = {}
    for each in checkpoints:
        layer = next((name for name in INPUT_LAYERS if name in each.tensors), None)
        if layer is not None and len(each.tensors[layer].shape) == 4:
            counts[each.source] = each.tensors[layer].shape[1]
    first = checkpoints[0]
    expected = counts.get(first.source)
    if expected is None:
        return
    output = next((first.tensors[n] for n in _OUTPUT_LAYERS if n in first.tensors), None)
    latent = output.shape[0] if output is not None else expected
    for source, count in counts.items():
        if count == expected or count == latent < expected:
            continue
        if expected == latent < count:
            raise AfaError(
                "AFA-MERGE-021",
                f"'{source}' has {_channels(count)}, '{first.source}' has {expected}. A merge has "
                "the input channels of the first expert, and can only pad the others with zeros. "
                f"List '{source}' first.",
            )
        raise AfaError(
            "AFA-MERGE-022",
            f"'{source}' has {_channels(count)}, '{first.source}' has {_channels(expected)}. All "
            f"models must have {expected} or {latent} input channels. Merge models of one kind.",
        )


def _channels(count: int) -> str:
    use = _INPAINTING.get(count)
    return f"{count} input channels" + (f" ({use})" if use else "")
