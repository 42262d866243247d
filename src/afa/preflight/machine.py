"""Will it fit into this machine, and how long will it take at the least?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.loading.finding import Finding
from afa.loading.memory.budget import program_bytes, size_text
from afa.loading.memory.needs import needs_of
from afa.loading.planned import Work
from afa.machine.free import free_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from afa.aggregators import SABWConfig
    from afa.loading.memory.needs import Needs

#: times what is free, from which on work is refused; estimates were within a quarter
_SURE = 1.25
_SIDE, _MEASURE = 1024, 0.2  # of the matrices that are multiplied, and for how many seconds


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


@dataclass(frozen=True)
class Job:
    """Work, and the experts that are to do it.

    Attributes:
        config: the pipeline's folder that describes them.
        num_experts: N.
        encoder_sets: how many models' text encoders there are.
        aggregators: of all sites; None for the mean.
        dtype: of the experts.
        work: what they do.
    """

    config: Path
    num_experts: int
    encoder_sets: int
    aggregators: SABWConfig | None
    dtype: torch.dtype
    work: Work

    def estimate(self) -> Estimate:
        """What it takes of this machine."""
        work, needs = self.work, self._needs(self.work.batch)
        seconds = work.num_steps * needs.flops / _speed(work.device, self.dtype)
        return Estimate(self._takes(needs), free_memory(work.device), seconds, work.num_steps)

    def bytes(self, batch: int) -> int:
        """What a batch takes of the device's memory, the program's own included."""
        return self._takes(self._needs(batch))

    def _takes(self, needs: Needs) -> int:
        is_on_cpu = self.work.device.type == "cpu"
        if self.work.is_offloaded and not is_on_cpu:
            return program_bytes(is_on_cpu) + needs.resting + 2 * needs.largest
        return program_bytes(is_on_cpu) + needs.in_memory

    def _needs(self, batch: int) -> Needs:
        return needs_of(
            self.config,
            self.num_experts,
            self.aggregators,
            encoder_sets=self.encoder_sets,
            dtype=self.dtype,
            batch=self.work.samples_each * batch,
            pixels=self.work.pixels,
            training=self.work.training,
        )


def fits(job: Job, found: Estimate) -> Iterator[Finding]:
    """Findings where it does not fit, with what would.

    An estimate is one: what is a little too much is a warning.
    """
    if found.takes <= found.free:
        return
    is_sure = found.takes > _SURE * found.free and os.environ.get("WORLD_SIZE", "1") == "1"
    yield Finding(
        "AFA-CHECK-002",
        "error" if is_sure else "warning",
        "memory",
        f"The work must fit into memory: it takes about {size_text(found.takes)}, and "
        f"{size_text(found.free)} of {job.work.device} are free.",
        "It would be ended halfway.",
        f"Take {', or '.join(_remedies(job, found))}.",
    )


def _remedies(job: Job, found: Estimate) -> Iterator[str]:
    work = job.work
    largest = largest_batch(job, found) if work.batch_name else 0
    if largest and work.training:
        times = -(-work.batch // largest)
        yield f"{work.batch_name}: {largest} with gradient_accumulation_steps: {times}"
    elif largest:
        yield f"{work.batch_name}: {largest}"
    if work.training and not work.training.is_checkpointed:
        yield "gradient_checkpointing: true"
    if work.training and not work.is_offloaded and work.device.type != "cpu":
        yield "offload_experts: true"
    if job.dtype == torch.float32:
        yield "experts in bfloat16"
    if not work.batch_name:
        yield "--memory-budget, which keeps experts elsewhere"
    yield "a machine with more memory"


def largest_batch(job: Job, found: Estimate) -> int:
    """How large a batch would fit; 0 where not even one does."""
    one, two = job.bytes(1), job.bytes(2)
    room = found.free - one
    if room < 0:
        return 0
    return min(1 + room // max(two - one, 1), job.work.batch)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a large product of matrices, measured."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)

    def product() -> None:
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _MEASURE:
        product()
        count += 1
    return count * 2 * _SIDE**3 / seconds
