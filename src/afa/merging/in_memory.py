"""Static merges of models in memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from afa.errors import AfaError
from afa.merging import MergeMethod, WeightedSum, merge_tensor
from afa.merging.checkpoints import canonical_name
from afa.merging.method import is_finite, is_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


@torch.no_grad()
def merge_models(
    models: Sequence[Model],
    method: MergeMethod,
    *,
    base: nn.Module | None = None,
    part: Literal["unet", "text_encoder", "text_encoder_2", "vae"] = "unet",
) -> Model:
    """A new model merged from several; the same numbers as `afa merge` writes.

    Arithmetic runs in float32; entries that are not floating point are the first model's.

    Args:
        models: of one architecture; not changed.
        method: how one tensor is merged.
        base: the model they were fine-tuned from, for methods that need it.
        part: what of a pipeline they are: block weights and random masks go by it.

    Raises:
        AfaError: no models, settings that do not fit, a base too few or too many, different
            architectures, or a result that is not finite.
    """
    if not models:
        raise AfaError("AFA-MERGE-011", "A merge must have at least one model, came none.")
    if base is not None and not method.needs_base:
        raise AfaError(
            "AFA-MERGE-012", f"A merge by {type(method).__name__} must have no base. Leave it out."
        )
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    base_state = None if base is None else base.state_dict()
    method = method.fit([canonical_name(part, name) for name in states[0]], len(models))
    for name, tensor in merged.state_dict().items():
        compared = states if base_state is None else [*states, base_state]
        parts = [state[name] for state in compared if name in state]
        if len(parts) < len(compared) or any(other.shape != tensor.shape for other in parts):
            raise AfaError(
                "AFA-MERGE-013",
                f"Merged models must share one architecture, but '{name}' is missing or of "
                "another shape in one of them.",
            )
        experts = parts[: len(models)]
        base_tensor = None if base_state is None else base_state[name]
        value = merge_tensor(method, canonical_name(part, name), experts, base_tensor)
        tensor.copy_(value)
        if not is_kept(name, tensor.dtype) and not is_finite(tensor):
            raise AfaError(
                "AFA-MERGE-014",
                f"A merged tensor must be finite, but '{name}' is not in {tensor.dtype}. Take "
                "models without nan and infinity, smaller weights, or float32.",
            )
    return merged


def weighted_merge(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """A new model whose every weight is the weighted mean of the models' (Weighted Merging).

    Args:
        models: of one architecture; not changed.
        weights: one per model, summing to 1; None is uniform.

    Raises:
        AfaError: no models, weights that do not fit or sum to 1, or different architectures.
    """
    return merge_models(models, WeightedSum(weights))
