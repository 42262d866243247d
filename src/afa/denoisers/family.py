"""What an ensemble has to know of one architecture, and how experts' texts travel in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from afa.denoisers.coroutine import Blocks


@dataclass(frozen=True)
class Widths:
    """Widths of what one expert's text encoders give, one number for each encoder.

    A pipeline runs each of its text encoders once, for all experts, and concatenates: [encoder 1 of
    all experts | encoder 2 of all experts | ...].

    Attributes:
        text: of the embedding of every token.
        pooled: of the embedding of the text as a whole; empty where there is none.
        num_clip_tokens: of Stable Diffusion 3, whose text is tokens of its first two encoders and
            then tokens of its third.
    """

    text: tuple[int, ...]
    pooled: tuple[int, ...] = ()
    num_clip_tokens: int = 0


@dataclass(frozen=True)
class Family:
    """How one family of denoisers is taken apart.

    Attributes:
        name: as saved ensembles have it.
        model_class: the library's.
        output_class: of its predictions.
        blocks: the coroutine; takes the model and the arguments of its forward pass by name, and an
            `execution` through which it runs the modules of `layers`, and all others as they are.
        layers: the large modules, in order.
        check: refuses a model that `blocks` does not know.
        example: the smallest complete arguments, on the meta device.
        widths: of the texts that a model takes.
        split: the arguments of each of N experts, from a model, those of the ensemble, and widths.
        attention_kwargs: the argument that may have a LoRA's `scale`.
        text_mask: the argument that says which tokens of a text count; None where all do.
        is_residual: whether every block adds to its input, on one grid.
        prompt: the argument that stays the same object in a denoising loop.
        conditional_last: whether pipelines with classifier-free guidance put the half with the
            prompt last.
        batches_guidance: whether pipelines with guidance compute both halves in one batch; those of
            Flux have none, or one after the other.
        timestep_divisor: what pipelines divide their scheduler's timesteps by before they call the
            denoiser; see `afa.denoisers.timesteps`.
    """

    name: str
    model_class: Any
    output_class: Any
    blocks: Callable[..., Blocks]
    layers: Callable[[Any], list[nn.Module]]
    check: Callable[[Any], None]
    example: Callable[[Any], dict[str, Any]]
    widths: Callable[[Any], Widths]
    split: Callable[[Any, Mapping[str, Any], Widths, int], list[dict[str, Any]]]
    attention_kwargs: str = "joint_attention_kwargs"
    text_mask: str | None = None
    is_residual: bool = True
    prompt: str = "encoder_hidden_states"
    conditional_last: bool = True
    batches_guidance: bool = True
    timestep_divisor: float = 1.0


def split_joined(what: str, joined: Tensor, widths: Sequence[int], count: int) -> list[Tensor]:
    """One tensor [..., D] for each of N experts.

    Args:
        what: for the error.
        joined: [..., D], the same for all, or [..., N * D], part by part that of all experts.
        widths: of the parts; their sum is D.
        count: N.

    Raises:
        AfaError: another width.
    """
    width, came = sum(widths), joined.shape[-1]
    if came == width:
        return [joined] * count
    if came != width * count:
        raise AfaError(
            f"The {what} must be {width} wide (one for all experts) or {count} x {width} (one per "
            f"expert, concatenated), came {came}. Use the pipeline's own text encoder."
        )
    parts = joined.split([w * count for w in widths], dim=-1)
    per_expert = zip(*(part.chunk(count, dim=-1) for part in parts), strict=True)
    if len(parts) == 1:
        # contiguous, or matrix products round differently from the expert's alone
        return [own.contiguous() for (own,) in per_expert]
    return [torch.cat(own, dim=-1) for own in per_expert]


def split_text(arguments: Mapping[str, Any], widths: Widths, count: int) -> list[dict[str, Any]]:
    """The arguments of N experts whose call has `encoder_hidden_states`."""
    texts = split_joined("text embedding", arguments["encoder_hidden_states"], widths.text, count)
    return [{**arguments, "encoder_hidden_states": text} for text in texts]


def split_pooled(
    per_expert: list[dict[str, Any]], pooled: Tensor, widths: Widths
) -> list[dict[str, Any]]:
    """The same arguments with each expert's own `pooled_projections`."""
    parts = split_joined("pooled text embedding", pooled, widths.pooled, len(per_expert))
    return [
        {**own, "pooled_projections": part} for own, part in zip(per_expert, parts, strict=True)
    ]
