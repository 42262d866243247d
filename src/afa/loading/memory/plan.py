"""From the names of experts to a plan of where to keep them, before any of them is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.files import parts_of, read_json
from afa.loading.memory.budget import MemoryPlan, choose, parse_size
from afa.loading.memory.needs import needs_of
from afa.loading.weights import hash_files, weights_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from afa.aggregators import SABWConfig
    from afa.loading.manifest import ExpertManifest

#: of a weight that `afa.loading.quantization` has packed
_QUANTISED_BITS = 8


def plan_experts(
    experts: Sequence[ExpertManifest],
    aggregators: SABWConfig | None,
    dtype: torch.dtype,
    budget: str | int,
    *,
    device: str | torch.device,
    pixels: int | None = None,
    is_quantised: bool = False,
) -> MemoryPlan:
    """The fastest way to keep experts that stays within a budget of the device's memory.

    An expert that is a LoRA counts as a whole one, which is more than it takes in memory.

    Args:
        experts: all of them.
        aggregators: of all sites; None for the mean.
        dtype: of weights.
        budget: bytes, or a size such as `8GB`; what this process takes already is a part of it.
        device: where everything is computed.
        pixels: height times width of a picture; None for what the experts were made for.
        is_quantised: whether linear layers are to have weights of 8 bits.

    Raises:
        AfaError: nothing fits, the budget is no size, or an expert that cannot be found or told.
    """
    limit = parse_size(budget) if isinstance(budget, str) else budget
    needs = needs_of(
        experts[0].config,
        len(experts),
        aggregators,
        encoder_sets=encoder_sets([expert.path for expert in experts]),
        dtype=dtype,
        pixels=pixels,
        weight_bits=_QUANTISED_BITS if is_quantised else None,
    )
    return choose(needs, limit, device, can_stream=not is_quantised)


def encoder_sets(paths: Sequence[Path]) -> int:
    """How many different text encoders experts have; files, which hold everything, each their own.

    Equal ones are kept once.
    """
    kinds = set()
    for path in dict.fromkeys(paths):
        if path.is_file():
            kinds.add(str(path))
            continue
        names = [
            n for n in parts_of(read_json(path / "model_index.json")) if n.startswith("text_enc")
        ]
        kinds.add(" ".join(hash_files(path, weights_in(path / name)[1]) for name in sorted(names)))
    return len(kinds)
