"""The curves of a soak test that are judged and plotted."""

from __future__ import annotations

from typing import Any

from benchmarks.soak.reads import BLOCK
from benchmarks.soak.verdict import COUNTS, NEVER


def curves_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Compute the judged curves: the recorded values without the safetensors leak, see `reads`.

    Anonymous memory is the maximum of three rounds, because released heaps are allocated again. The
    used memory, which is not judged, excludes the free memory that the C library keeps. Some of
    that may not be resident but is subtracted anyway, so a value can be too low.
    """
    curves = {name: [row[name] for row in rows] for name in (*COUNTS, *NEVER)}
    curves |= {name: [row[name] for row in rows] for name in ("allocated", "objects", "maps")}
    curves["blocks"] = [row["blocks"] - row["lost"] for row in rows]
    anonymous = [row["anonymous"] - BLOCK * row["lost"] for row in rows]
    curves["anonymous"] = _highest_of_three(anonymous)
    kept = [row["kept"] for row in rows]
    curves["used"] = _highest_of_three([a - b for a, b in zip(anonymous, kept, strict=True)])
    return curves


def _highest_of_three(values: list[float]) -> list[float]:
    """Return the maximum of each round and the two before it."""
    return [max(values[max(0, n - 2) : n + 1]) for n in range(len(values))]
