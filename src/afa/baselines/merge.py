"""Static merges: one set of weights from several."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


@torch.no_grad()
def weighted_merge(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """A new model whose every weight is the weighted mean of the models' (Weighted Merging).

    Sums run in float32; entries that are not floating point are the first model's.

    Args:
        models: of one architecture; not changed.
        weights: one per model, summing to 1; None is uniform.

    Raises:
        AfaError: no models, weights that do not fit or sum to 1, or different architectures.
    """
    if not models:
        raise AfaError("A merge must have at least one model, came none.")
    weights = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or abs(sum(weights) - 1) > 1e-6:
        raise AfaError(
            f"A merge of {len(models)} models must have as many weights, summing to 1; came "
            f"{weights}."
        )
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, tensor in merged.state_dict().items():
        parts = [state[name] for state in states if name in state]
        if len(parts) < len(models) or any(part.shape != tensor.shape for part in parts):
            raise AfaError(
                f"Merged models must share one architecture, but '{name}' is missing or of "
                "another shape in one of them."
            )
        if tensor.is_floating_point():
            total = sum(w * part.float() for w, part in zip(weights, parts, strict=True))
            tensor.copy_(total)
    return merged
