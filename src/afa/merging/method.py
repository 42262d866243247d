"""The interface of merge methods, and checks of their settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

# positions and masks of text encoders, which must not be averaged
_BUFFERS = ("position_ids", "attn_mask")


class MergeMethod(ABC):
    """Base class of merge methods, which merge one tensor of several experts at a time.

    Subclasses are frozen dataclasses that check their settings at construction. The result for a
    tensor depends only on the settings, its name and its values.
    """

    needs_base: ClassVar[bool] = False

    @abstractmethod
    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Merge one tensor.

        Args:
            name: name of the tensor in its checkpoint, such as `unet.conv_in.weight`.
            tensors: the experts' tensors, in float32 and of one shape; they are not modified.
            base: the tensor of the model that the experts were fine-tuned from; None unless
                `needs_base`.

        Returns: the merged tensor in float32, with the same shape.
        """

    def fit(self, names: Iterable[str], num_experts: int) -> MergeMethod:
        """Adapt the method to checkpoints with these tensors.

        Raises:
            AfaError: if the settings do not fit the number of experts or the tensors.
        """
        weights = getattr(self, "weights", None)
        if weights is not None:
            check_number(weights, num_experts)
        return self


def is_kept(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is copied from the first expert: integers, and buffers stored as floats."""
    return not dtype.is_floating_point or name.endswith(_BUFFERS)


def merge_tensor(
    method: MergeMethod, name: str, tensors: Sequence[Tensor], base: Tensor | None
) -> Tensor:
    """Merge one tensor in float32, or return the first expert's if `is_kept`."""
    if is_kept(name, tensors[0].dtype):
        return tensors[0]
    floats = [tensor.float() for tensor in tensors]
    return method.merge(name, floats, None if base is None else base.float())


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, computed without a mask of the tensor's size."""
    return tensor.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(tensor.float()))


def check_weights(weights: Sequence[float] | None, *, sum_to_one: bool) -> None:
    """Check that weights are finite, and that those of a mean sum to 1.

    Raises:
        AfaError: if not.
    """
    if weights is None:
        return
    if not all(math.isfinite(weight) for weight in weights):
        raise AfaError(
            "AFA-MERGE-015", f"The weights of a merge must be finite; got {list(weights)}."
        )
    if sum_to_one and abs(sum(weights) - 1) > 1e-6:
        raise AfaError(
            "AFA-MERGE-016",
            f"The weights of this merge must sum to 1; got {list(weights)} with sum "
            f"{sum(weights):.6g}.",
        )


def check_number(weights: Sequence[float], num_experts: int) -> None:
    """Check that there is one weight per expert.

    Raises:
        AfaError: if not.
    """
    if len(weights) != num_experts:
        raise AfaError(
            "AFA-MERGE-017",
            f"A merge of {num_experts} experts needs {num_experts} weights; got {list(weights)}.",
        )


def check_density(density: float) -> None:
    """Check that a density is above 0 and at most 1.

    Raises:
        AfaError: if not.
    """
    if not 0 < density <= 1:
        raise AfaError(
            "AFA-MERGE-018",
            f"density (the fraction of entries to keep) must be above 0 and at most 1; got "
            f"{density}.",
        )


def uniform(weights: Sequence[float] | None, num_experts: int) -> list[float]:
    """Return the weights, or 1/N each for None."""
    return [1 / num_experts] * num_experts if weights is None else list(weights)


def require_base(base: Tensor | None, method: MergeMethod) -> Tensor:
    """Return the base's tensor.

    Raises:
        AfaError: if it is None.
    """
    if base is None:
        raise AfaError(
            "AFA-MERGE-019",
            f"{type(method).__name__} needs the model that the experts were fine-tuned from; got "
            "None. Pass it as `base`.",
        )
    return base
