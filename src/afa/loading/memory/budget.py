"""Choose the fastest storage of experts that fits a memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from afa.loading.memory.needs import Needs

#: where the experts' layers are stored until they run
Place = Literal["memory", "offload", "stream"]

#: number of layers that are prefetched while one runs
AHEAD = 2
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", start=1)}
_CUDA = 600_000_000  # device memory used by CUDA and its libraries, roughly
_LABELS = {
    "memory": "all experts in memory",
    "offload": "experts in the CPU's memory, moved to the device layer by layer",
    "stream": "experts in a file, read layer by layer",
}


def parse_size(text: str) -> int:
    """Convert a size such as `8GB`, `7.5 GiB` or `900MB` to bytes.

    Raises:
        AfaError: if it is not such a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) == 0:
        raise AfaError(
            "AFA-MEMORY-001",
            f"A memory budget must be a size such as 8GB or 7.5GiB; got '{text}'.",
        )
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen storage of experts, and the estimates.

    Attributes:
        place: where the experts' layers are stored.
        budget: bytes of the device's memory.
        takes: bytes needed on the device for every considered place, the fastest first.
        program: bytes of these that are needed without any model.
        reserved: bytes of these for another model, which is always in memory.
    """

    place: Place
    budget: int
    takes: dict[Place, int]
    program: int
    reserved: int = 0

    def lines(self) -> list[str]:
        """Describe the plan for the user, before any work."""
        lines = [
            f"memory budget {size_text(self.budget)}, of which the program needs "
            f"{size_text(self.program)}"
            + (f", and the judge of drafts {size_text(self.reserved)}" if self.reserved else "")
        ]
        for place, needed in self.takes.items():
            verdict = "fits" if needed <= self.budget else "does not fit"
            chosen = ", chosen" if place == self.place else ""
            lines.append(f"  {size_text(needed):>9}  {_LABELS[place]}: {verdict}{chosen}")
        return lines


def choose(
    needs: Needs,
    budget: int,
    device: str | torch.device,
    *,
    can_stream: bool = True,
    reserved: int = 0,
) -> MemoryPlan:
    """Choose the fastest place that fits.

    Args:
        budget: usable bytes of the device's memory, including this process's own.
        can_stream: whether layers may be stored in a file.
        reserved: bytes for the judge of drafts, on the same device.

    Raises:
        AfaError: if nothing fits.
    """
    on_cpu = torch.device(device).type == "cpu"
    program = program_bytes(on_cpu)
    always = program + reserved
    takes: dict[Place, int] = {"memory": always + needs.in_memory}
    if not on_cpu:
        takes["offload"] = always + needs.resting + 2 * needs.largest
    if can_stream:
        takes["stream"] = always + needs.streamed(AHEAD)
    for place, needed in takes.items():
        if needed <= budget:
            return MemoryPlan(place, budget, takes, program, reserved)
    judge = f"; {size_text(reserved)} of it for the judge of drafts" if reserved else ""
    alone = "use no drafts (--no-drafts), " if reserved else ""
    raise AfaError(
        "AFA-MEMORY-002",
        f"The memory budget is {size_text(budget)}; these experts need at least "
        f"{size_text(min(takes.values()))} ({_LABELS[min(takes, key=lambda place: takes[place])]}"
        f"{judge}). Raise it, draw smaller pictures, {alone}or load the experts as bfloat16.",
    )


def program_bytes(on_cpu: bool) -> int:
    """Return the bytes that the program needs without any model."""
    return psutil.Process().memory_info().rss if on_cpu else _CUDA


def size_text(size: int) -> str:
    """Format bytes for the user."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
