"""Estimate the memory and the minimum time of work, and check that it fits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.loading.finding import Finding
from afa.loading.memory.budget import program_bytes, size_text
from afa.loading.memory.needs import needs_of, needs_of_predictions
from afa.loading.planned import Work
from afa.machine.devices import synchronize
from afa.machine.free import free_memory
from afa.machine.processes import num_launched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from afa.aggregators import SABWConfig
    from afa.loading.memory.bits import Bits
    from afa.loading.memory.needs import Needs

#: factor above the free memory that makes it an error; estimates were accurate to a quarter
_SURE = 1.25
_MEASURE = 0.2  # seconds of matrix products, to measure a device's speed


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time of work.

    Attributes:
        takes: bytes of device memory, including the program's own.
        free: free bytes of device memory, including what this process already uses.
        seconds: lower bound for all steps: their operations at the speed of a large matrix product.
        num_steps: number of steps.
    """

    takes: int
    free: int
    seconds: float
    num_steps: int


@dataclass(frozen=True)
class Job:
    """Work and the experts that do it.

    Attributes:
        config: pipeline folder with the experts' configurations.
        num_experts: number of experts.
        encoder_sets: number of models whose text encoders are loaded.
        aggregators: the aggregators' configuration; None for the mean.
        dtype: dtype of the experts.
        work: the work.
        weight_bits: bits of linear weights that stay quantised; None without such experts.
        configs: of experts whose predictions alone are fused, one folder each.
    """

    config: Path
    num_experts: int
    encoder_sets: int
    aggregators: SABWConfig | None
    dtype: torch.dtype
    work: Work
    weight_bits: Bits | None = None
    configs: Sequence[Path] = ()

    def estimate(self) -> Estimate:
        """Estimate memory and time on this machine."""
        work, needs = self.work, self._needs(self.work.batch)
        seconds = work.num_steps * needs.flops / _speed(work.device, self.dtype)
        return Estimate(self._takes(needs), free_memory(work.device), seconds, work.num_steps)

    def bytes(self, batch: int) -> int:
        """Device memory for a batch of this size, including the program's own."""
        return self._takes(self._needs(batch))

    def _takes(self, needs: Needs) -> int:
        is_on_cpu = self.work.device.type == "cpu"
        if self.work.is_offloaded and not is_on_cpu:
            return program_bytes(is_on_cpu) + needs.resting + 2 * needs.largest
        return program_bytes(is_on_cpu) + needs.in_memory

    def _needs(self, batch: int) -> Needs:
        if self.configs:
            return needs_of_predictions(
                self.configs,
                self.aggregators,
                dtype=self.dtype,
                batch=self.work.samples_each * batch,
                pixels=self.work.pixels,
                weight_bits=self.weight_bits,
                training=self.work.training,
            )
        return needs_of(
            self.config,
            self.num_experts,
            self.aggregators,
            encoder_sets=self.encoder_sets,
            dtype=self.dtype,
            batch=self.work.samples_each * batch,
            pixels=self.work.pixels,
            weight_bits=self.weight_bits,
            training=self.work.training,
        )


def fits(job: Job, found: Estimate) -> Iterator[Finding]:
    """Yield a finding if the work does not fit into memory: a warning if it is close, or an error.

    With several processes, which may share the experts, it is always a warning.
    """
    if found.takes <= found.free:
        return
    is_sure = found.takes > _SURE * found.free and num_launched() == 1
    yield Finding(
        "AFA-CHECK-002",
        "error" if is_sure else "warning",
        "memory",
        f"The work needs about {size_text(found.takes)} of memory; {job.work.device} has "
        f"{size_text(found.free)} free.",
        "It would run out of memory.",
        f"Use {', or '.join(_remedies(job, found))}.",
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
        yield "--memory-budget, which offloads experts"
    yield "a machine with more memory"


def largest_batch(job: Job, found: Estimate) -> int:
    """The largest batch size that fits; 0 if a batch of one does not."""
    one, two = job.bytes(1), job.bytes(2)
    free = found.free - one
    if free < 0:
        return 0
    return min(1 + free // max(two - one, 1), job.work.batch)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product."""
    # 1024 would take seconds on a CPU without instructions for half precision
    side = 512 if device.type == "cpu" else 1024
    matrix = torch.ones(side, side, device=device, dtype=dtype)

    def product() -> None:
        matrix @ matrix
        synchronize(device)

    product()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _MEASURE:
        product()
        count += 1
    return count * 2 * side**3 / seconds
