"""Plan where experts are stored, before any of them is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.files import parts_of, read_json
from afa.loading.memory.bits import EIGHT, bits_of
from afa.loading.memory.budget import MemoryPlan, choose, parse_size
from afa.loading.memory.needs import needs_of
from afa.loading.weights import hash_files, weights_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from afa.aggregators import SABWConfig
    from afa.loading.manifest import ExpertManifest


def plan_experts(
    experts: Sequence[ExpertManifest],
    aggregators: SABWConfig | None,
    dtype: torch.dtype,
    budget: str | int,
    *,
    device: str | torch.device,
    pixels: int | None = None,
    is_quantised: bool = False,
    reserved: int = 0,
) -> MemoryPlan:
    """Choose the fastest storage of experts that fits a budget of the device's memory.

    A LoRA is counted as a complete expert, which is more than it needs. Weights that are quantised
    in an expert's file count with the bytes that they have there.

    Args:
        aggregators: of all sites; None for the mean.
        budget: bytes, or a size such as `8GB`; includes what this process already uses.
        pixels: height times width of a picture; None for the experts' native resolution.
        is_quantised: whether linear layers get 8-bit weights.
        reserved: bytes for another model on the device.

    Raises:
        AfaError: if nothing fits, the budget is not a size, or an expert cannot be identified.
    """
    limit = parse_size(budget) if isinstance(budget, str) else budget
    needs = needs_of(
        experts[0].config,
        len(experts),
        aggregators,
        encoder_sets=encoder_sets([expert.path for expert in experts]),
        dtype=dtype,
        pixels=pixels,
        weight_bits=EIGHT if is_quantised else bits_of(experts, dtype),
    )
    return choose(needs, limit, device, can_stream=not is_quantised, reserved=reserved)


def bytes_alone(expert: ExpertManifest, dtype: torch.dtype) -> int:
    """Estimate the bytes of one complete model's weights."""
    bits = bits_of([expert], dtype)
    needs = needs_of(expert.config, 1, None, encoder_sets=1, dtype=dtype, weight_bits=bits)
    return needs.in_memory - needs.work


def encoder_sets(paths: Sequence[Path]) -> int:
    """Count the different sets of text encoders of experts.

    Equal sets are loaded once; every single file counts as one.
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
