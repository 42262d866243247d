"""Memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes of memory that this process had at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
