"""Merge models in memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from afa.denoisers.packed import packed_layers, unpack_layers
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
    """Merge models into a new one, with the same result as `afa merge`.

    Computes in float32, from dequantised weights if they are quantised. Tensors that are not
    floating point are copied from the first model.

    Args:
        models: models of one architecture; they are not modified.
        method: the merge method.
        base: the model that they were fine-tuned from, for methods that need it.
        part: the component that the models are, for block weights and random masks.

    Raises:
        AfaError: if there are no models, the settings do not fit them, a base is missing or not
            allowed, the architectures differ, or the result has non-finite values.
    """
    if not models:
        raise AfaError("AFA-MERGE-011", "Got no models. A merge needs at least one.")
    if base is not None and not method.needs_base:
        raise AfaError(
            "AFA-MERGE-012", f"{type(method).__name__} does not use a base. Omit `base`."
        )
    models = [_dense(model) for model in models]
    base = None if base is None else _dense(base)
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
                f"The architectures differ: '{name}' is missing or has another shape in one of "
                "the models. Merge models of one architecture.",
            )
        experts = parts[: len(models)]
        base_tensor = None if base_state is None else base_state[name]
        value = merge_tensor(method, canonical_name(part, name), experts, base_tensor)
        tensor.copy_(value)
        if not is_kept(name, tensor.dtype) and not is_finite(tensor):
            raise AfaError(
                "AFA-MERGE-014",
                f"The merged tensor '{name}' has non-finite values (NaN or infinity) in "
                f"{tensor.dtype}. Use finite models, smaller merge weights, or float32.",
            )
    return merged


def _dense(model: Model) -> Model:
    """Return the model, or a copy with dequantised weights."""
    if not packed_layers(model):
        return model
    copied = copy.deepcopy(model)
    unpack_layers(copied)
    return copied


def weighted_merge(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """Merge models into a new one by the weighted mean of their parameters.

    Args:
        models: models of one architecture; they are not modified.
        weights: one per model, summing to 1; None uses 1/N each.

    Raises:
        AfaError: if there are no models, the number of weights is wrong, they do not sum to 1, or
            the architectures differ.
    """
    return merge_models(models, WeightedSum(weights))
