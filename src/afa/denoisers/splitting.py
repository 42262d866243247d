"""Split the concatenated text embeddings of an ensemble's call into those of each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from afa.denoisers.family import Widths


def split_joined(what: str, joined: Tensor, widths: Sequence[int], count: int) -> list[Tensor]:
    """Split a concatenated embedding into one tensor [..., D] for each of N experts.

    Args:
        what: the name of the embedding, for the error.
        joined: [..., D], one embedding for all experts, or [..., N * D], for each part in turn the
            embeddings of all experts.
        widths: the widths of the parts; their sum is D.
        count: N.

    Raises:
        AfaError: if the last axis is neither D nor N * D.
    """
    width, got = sum(widths), joined.shape[-1]
    if got == width:
        return [joined] * count
    if got != width * count:
        raise AfaError(
            "AFA-MODEL-003",
            f"The {what} must be {width} wide (one for all experts) or {count} x {width} (one per "
            f"expert, concatenated); got {got}. Use the pipeline's own text encoder.",
        )
    parts = joined.split([w * count for w in widths], dim=-1)
    per_expert = zip(*(part.chunk(count, dim=-1) for part in parts), strict=True)
    if len(parts) == 1:
        # contiguous, because matrix products of strided inputs may round differently
        return [own.contiguous() for (own,) in per_expert]
    return [torch.cat(own, dim=-1) for own in per_expert]


def split_text(arguments: Mapping[str, Any], widths: Widths, count: int) -> list[dict[str, Any]]:
    """Split `encoder_hidden_states` of an ensemble's arguments; returns those of N experts."""
    texts = split_joined("text embedding", arguments["encoder_hidden_states"], widths.text, count)
    return [{**arguments, "encoder_hidden_states": text} for text in texts]


def split_pooled(
    per_expert: list[dict[str, Any]], pooled: Tensor, widths: Widths
) -> list[dict[str, Any]]:
    """Add each expert's own part of the pooled text embedding as `pooled_projections`."""
    parts = split_joined("pooled text embedding", pooled, widths.pooled, len(per_expert))
    return [
        {**own, "pooled_projections": part} for own, part in zip(per_expert, parts, strict=True)
    ]
