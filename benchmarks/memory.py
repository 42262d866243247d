"""Memory of the current process."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Return the peak resident memory of this process in bytes.

    `ru_maxrss` is not used, because a process inherits it from its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (high,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(high) * 1024
