"""Will it fit into this machine, and how long will it take at the least?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.memory.budget import program_bytes, size_text
from afa.memory.free import free_memory
from afa.memory.needs import Training, needs_of
from afa.preflight.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from afa.aggregators import SABWConfig
    from afa.memory.free import free_memory
from afa.memory.needs import Needs

#: times what is free, from which on work is refused; estimates were within a quarter
_SURE = 1.25
_SIDE, _MEASURE = 1024, 0.2  # of the matrices that are multiplied, and for how many seconds


@dataclass(frozen=True)
class Work:
    """What is to be done with experts.

    Attributes:
        config: the pipeline's folder that describes them.
        num_experts: N.
        encoder_sets: how many models' text encoders there are.
        aggregators: of all sites; None for the mean.
        dtype: of the experts.
        device: where.
        batch: samples of a step; pictures with guidance count twice.
        num_steps: of all of it.
        pixels: height times width; None for what the experts were made for.
        training: of aggregators; None where pictures are drawn.
        is_offloaded: whether the experts' layers come to the device one at a time.
    """

    config: Path
    num_experts: int
    encoder_sets: int
    aggregators: SABWConfig | None
    dtype: torch.dtype
    device: torch.device
    batch: int
    num_steps: int = 1
    pixels: int | None = None
    training: Training | None = None
    is_offloaded: bool = False

    def bytes(self, batch: int | None = None) -> int:
        """What it takes of the device's memory, with another batch where one is given."""
        needs = self.needs(batch)
        if self.is_offloaded and self.device.type != "cpu":
            return needs.resting + 2 * needs.largest
        return needs.in_memory

    def needs(self, batch: int | None = None) -> Needs:
        """What it takes, with another batch where one is given."""
        return needs_of(
            self.config,
            self.num_experts,
            self.aggregators,
            encoder_sets=self.encoder_sets,
            dtype=self.dtype,
            batch=batch or self.batch,
            pixels=self.pixels,
            training=self.training,
        )


@dataclass(frozen=True)
class Estimate:
    """Told before any work.

    Attributes:
        takes: bytes of the device's memory, the program's own included.
        free: bytes that are to be had there, what this process has already included.
        seconds: of all steps, at the least: their operations at the speed of a large product of
            matrices, which nothing reaches as a whole.
        num_steps: how many those are.
    """

    takes: int
    free: int
    seconds: float
    num_steps: int


def estimate(work: Work) -> Estimate:
    """What work takes of this machine."""
    needs = work.needs()
    takes = program_bytes(work.device.type == "cpu") + work.bytes()
    seconds = work.num_steps * needs.flops / _speed(work)
    return Estimate(takes, free_memory(work.device), seconds, work.num_steps)


def fits(work: Work, found: Estimate) -> Iterator[Finding]:
    """Findings where it does not fit, with what would.

    An estimate is one: what is a little too much is a warning.
    """
    if found.takes <= found.free:
        return
    is_sure = found.takes > _SURE * found.free and os.environ.get("WORLD_SIZE", "1") == "1"
    largest = largest_batch(work, found)
    remedies = []
    what = "batch_size" if work.training else "sampling.batch_size"
    if largest:
        remedies.append(f"{what}: {largest}")
        if work.training:
            times = -(-work.batch // largest)
            remedies[-1] += f" with gradient_accumulation_steps: {times}"
    if work.training and not work.training.is_checkpointed:
        remedies.append("gradient_checkpointing: true")
    if work.dtype == torch.float32:
        remedies.append("experts in bfloat16")
    if work.training is None:
        remedies.append("--memory-budget, which keeps experts elsewhere")
    yield Finding(
        "error" if is_sure else "warning",
        "memory",
        f"The work must fit into memory: it takes about {size_text(found.takes)}, and "
        f"{size_text(found.free)} of {work.device} are free.",
        "It would be ended halfway.",
        f"Take {', or '.join(remedies)}.",
    )


def largest_batch(work: Work, found: Estimate) -> int:
    """How many samples of a step would fit; 0 where not even one does."""
    one, two = work.bytes(1), work.bytes(2)
    room = found.free - (found.takes - work.bytes()) - one
    if room < 0:
        return 0
    return min(1 + room // max(two - one, 1), work.batch)


def _speed(work: Work) -> float:
    """Operations a second in a large product of matrices, measured."""
    matrix = torch.ones(_SIDE, _SIDE, device=work.device, dtype=work.dtype)

    def product() -> None:
        matrix @ matrix
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)

    product()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _MEASURE:
        product()
        count += 1
    return count * 2 * _SIDE**3 / seconds
