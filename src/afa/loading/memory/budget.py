"""A budget of memory, and the fastest way to stay within it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from afa.loading.memory.needs import Needs

#: where the experts' layers are until they run
Place = Literal["memory", "offload", "stream"]

#: how many layers are read ahead while one runs
AHEAD = 2
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", start=1)}
_CUDA = 600_000_000  # what CUDA and its libraries take of a device, roughly
_SAID = {
    "memory": "all experts in memory",
    "offload": "experts in the processor's memory, brought a layer at a time",
    "stream": "experts in a file, read a layer at a time",
}


def parse_size(text: str) -> int:
    """Bytes of `8GB`, `7.5 GiB`, `900MB`.

    Raises:
        AfaError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) == 0:
        raise AfaError(
            "AFA-MEMORY-001",
            f"A memory budget must be a size such as 8GB or 7.5GiB, came '{text}'.",
        )
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen, and why.

    Attributes:
        place: where the experts' layers are.
        budget: bytes, of the device's memory.
        takes: bytes there by place, for every place that was considered, the fastest first.
        program: bytes of these that are no model's.
    """

    place: Place
    budget: int
    takes: dict[Place, int]
    program: int

    def lines(self) -> list[str]:
        """For a user to read, before any work."""
        lines = [
            f"memory budget {size_text(self.budget)}, of which {size_text(self.program)} is the "
            "program"
        ]
        for place, needed in self.takes.items():
            verdict = "fits" if needed <= self.budget else "does not fit"
            chosen = ", chosen" if place == self.place else ""
            lines.append(f"  {size_text(needed):>9}  {_SAID[place]}: {verdict}{chosen}")
        return lines


def choose(
    needs: Needs, budget: int, device: str | torch.device, *, can_stream: bool = True
) -> MemoryPlan:
    """The fastest way that fits.

    Args:
        needs: of the ensemble.
        budget: bytes of the device's memory that may be used, this process's own included.
        device: where everything is computed.
        can_stream: whether layers may be kept in a file.

    Raises:
        AfaError: nothing fits.
    """
    on_cpu = torch.device(device).type == "cpu"
    program = program_bytes(on_cpu)
    takes: dict[Place, int] = {"memory": program + needs.in_memory}
    if not on_cpu:
        takes["offload"] = program + needs.resting + 2 * needs.largest
    if can_stream:
        takes["stream"] = program + needs.streamed(AHEAD)
    for place, needed in takes.items():
        if needed <= budget:
            return MemoryPlan(place, budget, takes, program)
    raise AfaError(
        "AFA-MEMORY-002",
        f"The memory budget must be at least {size_text(min(takes.values()))} for these experts "
        f"({_SAID[min(takes, key=lambda place: takes[place])]}), is {size_text(budget)}. Raise it, "
        "draw smaller pictures, or load the experts as bfloat16.",
    )


def program_bytes(on_cpu: bool) -> int:
    """Bytes that are taken whatever is loaded."""
    return psutil.Process().memory_info().rss if on_cpu else _CUDA


def size_text(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
