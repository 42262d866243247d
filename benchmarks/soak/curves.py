"""What is judged and drawn of a soak's lines."""

from __future__ import annotations

from typing import Any

from benchmarks.soak.reads import BLOCK
from benchmarks.soak.verdict import COUNTS, NEVER


def curves_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What is judged: the lines' values without what the library of weights loses, see `reads`.

    Of anonymous memory it is the highest of three rounds: heaps that were given back come again.
    What is used, which is not judged, is without what the C library keeps free; some of that is
    not resident at times, and is taken off all the same, so that a value may be too low.
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
    """Of each round and the two before."""
    return [max(values[max(0, n - 2) : n + 1]) for n in range(len(values))]
