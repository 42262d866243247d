"""What a static merge is: a rule for one tensor of several checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

# buffers of text encoders: positions and masks, of which a mean means nothing
_BUFFERS = ("position_ids", "attn_mask")


class MergeMethod(ABC):
    """One way to make one tensor out of the same tensor of several experts.

    Subclasses are frozen dataclasses: their settings are checked at construction, and a tensor's
    result depends on nothing but the settings, its name and its values.
    """

    needs_base: ClassVar[bool] = False

    @abstractmethod
    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Merge one tensor.

        Args:
            name: of the tensor in its checkpoint, such as `unet.conv_in.weight`.
            tensors: of the experts, in float32 and of one shape; not changed.
            base: of the model the experts were fine-tuned from; None where not `needs_base`.

        Returns: the merged tensor in float32, of the same shape.
        """

    def fit(self, names: Iterable[str], num_experts: int) -> MergeMethod:
        """This method, for checkpoints of these tensors.

        Raises:
            AfaError: the settings are for another number of experts, or other tensors.
        """
        weights = getattr(self, "weights", None)
        if weights is not None:
            check_number(weights, num_experts)
        return self


def is_kept(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is the first expert's: integers, and buffers that some store as floats."""
    return not dtype.is_floating_point or name.endswith(_BUFFERS)


def merge_tensor(
    method: MergeMethod, name: str, tensors: Sequence[Tensor], base: Tensor | None
) -> Tensor:
    """One tensor of the merge: in float32, or the first expert's as it is, see `is_kept`."""
    if is_kept(name, tensors[0].dtype):
        return tensors[0]
    floats = [tensor.float() for tensor in tensors]
    return method.merge(name, floats, None if base is None else base.float())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, without a mask as large as the tensor."""
    return tensor.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(tensor.float()))


def check_weights(weights: Sequence[float] | None, *, sum_to_one: bool) -> None:
    """Refuse weights that are not finite, or a mean's that do not sum to 1.

    Raises:
        AfaError: says what came.
    """
    if weights is None:
        return
    if not all(math.isfinite(weight) for weight in weights):
        raise AfaError(
            "AFA-MERGE-015", f"The weights of a merge must be finite; came {list(weights)}."
        )
    if sum_to_one and abs(sum(weights) - 1) > 1e-6:
        raise AfaError(
            "AFA-MERGE-016",
            f"The weights of this merge must be one per expert, summing to 1; came "
            f"{list(weights)}, which sum to {sum(weights):.6g}.",
        )


def check_number(weights: Sequence[float], num_experts: int) -> None:
    """Refuse weights of another number than the experts.

    Raises:
        AfaError: says how many came.
    """
    if len(weights) != num_experts:
        raise AfaError(
            "AFA-MERGE-017",
            f"A merge of {num_experts} experts must have as many weights; came {list(weights)}.",
        )


def check_density(density: float) -> None:
    """Refuse a share of kept entries that is no share.

    Raises:
        AfaError: says what came.
    """
    if not 0 < density <= 1:
        raise AfaError(
            "AFA-MERGE-018",
            f"The density must be above 0 and at most 1, the share of entries to keep; came "
            f"{density}.",
        )


def uniform(weights: Sequence[float] | None, num_experts: int) -> list[float]:
    """The weights, or the same for every expert, summing to 1."""
    return [1 / num_experts] * num_experts if weights is None else list(weights)


def require_base(base: Tensor | None, method: MergeMethod) -> Tensor:
    """The base's tensor.

    Raises:
        AfaError: there is none.
    """
    if base is None:
        raise AfaError(
            "AFA-MERGE-019",
            f"{type(method).__name__} must have the model that the experts were fine-tuned from; "
            "none came. Name it as base.",
        )
    return base
