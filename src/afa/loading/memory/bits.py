"""Bits of the experts' linear weights in memory: quantised by afa, or quantised in their files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from afa.loading.single_file.layout import names_by_part
from afa.loading.single_file.packed.layout import layout_of, model_shapes
from afa.loading.single_file.packed.read import file_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from afa.loading.manifest import ExpertManifest


@dataclass(frozen=True)
class Bits:
    """Bits per linear weight of an ensemble's experts.

    Attributes:
        mean: of all experts.
        most: of the expert with the most.
        is_dequantised: whether a layer's weight is dequantised when it runs, which needs memory for
            one weight in float32 and in the compute type.
    """

    mean: float
    most: float
    is_dequantised: bool = False


#: of weights that `afa.loading.quantization` quantised, besides a scale per row
EIGHT = Bits(8, 8)


def bits_of(experts: Sequence[ExpertManifest], dtype: torch.dtype) -> Bits | None:
    """Count the bits that the experts' linear weights have in memory.

    An expert with a LoRA counts as dequantised, because its changed layers are.

    Args:
        dtype: in which the experts compute, and of weights that are not quantised.

    Returns: None if no expert keeps quantised weights.

    Raises:
        AfaError: if a file is damaged or quantised in an unknown way.
    """
    plain = 8.0 * dtype.itemsize
    each = [_bits_of(expert, plain) for expert in experts]
    if all(bits == plain for bits in each):
        return None
    return Bits(sum(each) / len(each), max(each), is_dequantised=True)


def _bits_of(expert: ExpertManifest, plain: float) -> float:
    if expert.path.is_dir() or expert.source.lora is not None:
        return plain
    if not layout_of(expert.path).quantised:
        return plain
    kind, tensors = expert.kind, file_tensors(expert.path)
    names = names_by_part(model_shapes(expert.path), kind).get(kind.denoiser, {}).values()
    matrices = [tensors[n] for n in names if n.endswith(".weight") and len(tensors[n].shape) == 2]
    elements = sum(prod(each.shape) for each in matrices)
    bits = sum(
        8.0 * each.num_bytes if each.can_pack else plain * prod(each.shape) for each in matrices
    )
    return bits / elements if elements else plain
