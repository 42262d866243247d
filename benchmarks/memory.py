"""Memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes of memory that this process had at the most.

    Not `ru_maxrss`, which a process takes over from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (high,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(high) * 1024
