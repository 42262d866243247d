"""DARE: drop random entries of each expert's difference from the base, and rescale the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from afa.merging.method import MergeMethod, check_density, check_weights, require_base, uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dare(MergeMethod):
    """base + sum_n w_n m_n (t_n - base) / density, m_n ~ Bernoulli(density).

    Drop And REscale (Yu et al. 2024, arXiv 2311.03099, section 3) with drop rate p = 1 - density,
    followed by task arithmetic. The masks depend only on the seed and the tensor's name, not on
    other tensors or the global random state. They are sampled on the CPU.

    Attributes:
        weights: one per expert, with any sum; None uses 1/N each.
        density: fraction of entries to keep; 1 equals `AddDifference`.
        seed: seed of the masks.
    """

    weights: Sequence[float] | None = None
    _: KW_ONLY
    density: float
    seed: int = 0
    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=False)
        check_density(self.density)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Drop, rescale, weight and add to the base."""
        base = require_base(base, self)
        total = base.clone()
        # peft's random pruning would use the global generator
        generator = torch.Generator().manual_seed(tensor_seed(self.seed, name))
        for tensor, weight in zip(tensors, uniform(self.weights, len(tensors)), strict=True):
            difference = tensor - base
            if self.density < 1:
                chances = torch.full(tensor.shape, self.density)
                mask = torch.bernoulli(chances, generator=generator)
                difference = difference.mul_(mask.to(difference.device)).div_(self.density)
            total += weight * difference
        return total


def tensor_seed(seed: int, name: str) -> int:
    """Derive a seed for each tensor from the seed and its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
