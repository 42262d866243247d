"""Free memory of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process can use, including its own."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min(available, *_limits()) if device.type == "cpu" else available


def _limits() -> list[int]:
    """Return the memory limits of this process: its resource limit and its cgroup's."""
    limits = _of_process()
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        place = Path(name)
        text = place.read_text(encoding="utf-8").strip() if place.is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return limits or [2**63]


def _of_process() -> list[int]:
    if sys.platform == "win32":  # has no such limits
        return []
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    here = psutil.Process().memory_info()
    return [soft - here.vms + here.rss] if soft != resource.RLIM_INFINITY else []
