"""TIES: trim each expert's difference from the base, elect signs, average the agreeing ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

from afa.errors import AfaError
from afa.merging.method import MergeMethod, check_density, check_weights, require_base

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 2**22


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, section 3).

    Each difference t_n - base keeps its largest entries; a sign is elected per entry; the entries
    of that sign are averaged and added to the base. Differences are trimmed per tensor, as in
    peft, and not over the whole model, so that one tensor of each expert is in memory.

    Attributes:
        weights: one per expert, scaling its trimmed difference after the election; the sum is
            divided by the number of experts that agree. None uses 1 each, the plain mean. With
            equal weights, the weight is the paper's lambda.
        density: fraction of entries to keep; default: the paper's k = 20 %. Entries that tie with
            the smallest one kept are kept too.
        majority_sign: "total" elects the sign of the larger sum, as in the paper; "frequency" the
            sign of more experts.
    """

    weights: Sequence[float] | None = None
    density: float = 0.2
    majority_sign: Literal["total", "frequency"] = "total"
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=False)
        check_density(self.density)
        if self.majority_sign not in ("total", "frequency"):
            raise AfaError(
                "AFA-MERGE-040",
                f"majority_sign must be 'total' or 'frequency'; got '{self.majority_sign}'.",
            )

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Trim, elect signs, average and add to the base."""
        base = require_base(base, self)
        trimmed = [trim(tensor - base, self.density).reshape(-1) for tensor in tensors]
        weights = torch.ones(len(tensors), 1, device=base.device)
        if self.weights is not None:
            weights = torch.tensor(self.weights, device=base.device).unsqueeze(1)
        merged = base.reshape(-1).clone()
        # the rest is elementwise and runs in chunks to save memory
        for start in range(0, merged.numel(), _CHUNK):
            chunk = torch.stack([task[start : start + _CHUNK] for task in trimmed])
            agrees = calculate_majority_sign_mask(chunk, method=self.majority_sign)
            merged[start : start + _CHUNK] += disjoint_merge(chunk * weights, agrees)
        return merged.reshape(base.shape)


def trim(difference: Tensor, density: float) -> Tensor:
    """Set all but the largest entries to zero, in place.

    This needs one copy of the tensor; `torch.topk`, which peft uses, needs four.
    """
    num_kept = int(density * difference.numel())
    if num_kept == difference.numel():
        return difference
    if num_kept == 0:
        return difference.zero_()
    magnitudes = difference.abs()
    ranked = magnitudes.reshape(-1).cpu().numpy().copy()
    ranked.partition(ranked.size - num_kept)
    return difference.mul_(magnitudes >= float(ranked[ranked.size - num_kept]))
