"""The cost of pictures: seconds, memory and expert calls."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.predictor import Predictor
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.machine.devices import synchronize
from afa.provenance import processor, releases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

    from afa.denoisers import Family

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """The cost of one batch of pictures.

    `expert_calls` counts evaluations of one expert's denoiser on one latent: 2 N T per picture for
    N experts and T steps with guidance. Drafts and the calls of their judge are included. It counts
    runs of the middle layer, so steps that reuse that layer's cached feature do not count.
    `peak_memory` is in bytes, of the accelerator or else of the whole process; None if the system
    does not report it. `measured_on` names the machine and the software, on which seconds and the
    last bits of pictures depend. Seconds and calls are None if nobody measured them; see
    `afa.evaluation.given`.
    """

    seconds: float | None = 0.0
    peak_memory: int | None = None
    expert_calls: float | None = 0
    measured_on: str = ""


def _layers(family: Family, expert: Any) -> list[Any]:
    """The layers of an expert; of an ensemble of predictions, each has a family of its own."""
    if isinstance(expert, Predictor):
        return expert.kind.family.layers(expert.denoiser)
    return family.layers(expert)


@contextmanager
def measure(pipeline: DiffusionPipeline) -> Iterator[Cost]:
    """Measure the cost of the block; the values are set when it ends."""
    cost, calls = Cost(), 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += len(args[0] if args else kwargs["hidden_states"])

    denoiser = denoiser_of(pipeline)
    experts = list(denoiser.experts) if isinstance(denoiser, EnsembleDenoiser) else [denoiser]
    if (drafter := getattr(denoiser, "drafter", None)) is not None:
        experts.append(denoiser_of(drafter.judge))
    # a layer runs once per call, both in diffusers' forward and in the coroutine
    family = kind_of_pipeline(pipeline).family
    distinct = {id(expert): _layers(family, expert) for expert in experts}.values()
    hooks = [
        listed[len(listed) // 2].register_forward_pre_hook(count, with_kwargs=True)
        for listed in distinct
    ]
    device = denoiser.device
    _reset_peak(device)
    started = time.perf_counter()
    try:
        yield cost
        synchronize(device)
        cost.seconds, cost.expert_calls = time.perf_counter() - started, calls
        cost.peak_memory = _peak(device)
        cost.measured_on = _machine(device)
    finally:
        for hook in hooks:
            hook.remove()


def _machine(device: torch.device) -> str:
    """The device and the software versions."""
    threads = torch.get_num_threads()
    place = f"{processor()}, {threads} threads"
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    software = releases("afa", "torch", "diffusers", "transformers").items()
    return f"{place}; {', '.join(f'{name} {release}' for name, release in software)}"


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5", encoding="utf-8")  # proc(5): resets the peak to the current use
    except OSError:  # not on Linux, or not allowed
        return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
