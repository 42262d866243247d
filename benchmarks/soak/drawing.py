"""Plot the curves of a soak test against time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.drawing.plots import save_figure
from benchmarks.soak.curves import curves_of
from benchmarks.soak.reads import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.soak.verdict import Verdict

# Okabe and Ito's palette, suitable for common colour vision deficiencies
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX"
_MEMORY = {
    "rss": "resident",
    "anonymous": "anonymous",
    "used": "in use, without the safetensors leak",
    "allocated": "allocated by the C library",
    "lost": "leaked by safetensors",
}
_COUNTS = {
    "fds": "file descriptors",
    "threads": "threads",
    "children": "child processes",
    "tensors": "tensors",
    "deleted": "maps of deleted files",
}
_OBJECTS = {
    "objects": "Python objects",
    "blocks": "Python memory blocks, without leaked ones",
    "cached": "entries in caches",
}


def draw(rows: Sequence[dict[str, Any]], verdict: Verdict, path: Path) -> None:
    """Plot memory, objects and counts after every round; the warm-up is grey.

    Args:
        rows: The records of a soak test.
        verdict: The verdict on them.
        path: A PNG or SVG file, by its suffix.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 8.0), layout="constrained")
    memory, objects, counts = figure.subplots(3, 1, sharex=True)
    minutes = [row["seconds"] / 60 for row in rows]
    curves = curves_of(list(rows))
    curves["rss"] = [row["rss"] for row in rows]
    curves["anonymous"] = [row["anonymous"] for row in rows]
    curves["lost"] = [BLOCK * row["lost"] for row in rows]
    _draw(memory, minutes, curves, _MEMORY, 1e6)
    memory.set_ylabel("MB")
    _draw(objects, minutes, curves, _OBJECTS, 1e3)
    objects.set_ylabel("thousands")
    _draw(counts, minutes, curves, _COUNTS, 1)
    counts.set_ylabel("count")
    counts.set_xlabel("minutes")
    for axis in (memory, objects, counts):
        axis.axvspan(0, minutes[min(verdict.warm_up, len(rows)) - 1], color="#dddddd", zorder=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(
        f"One process, {len(rows)} rounds of drawing and training; grey: warm-up\n"
        f"{verdict.lines()[-1]}",
        fontsize=9,
    )
    save_figure(figure, path)


def _draw(
    axis: Axes,
    minutes: Sequence[float],
    curves: dict[str, list[float]],
    names: dict[str, str],
    unit: float,
) -> None:
    for n, (name, label) in enumerate(names.items()):
        values = [value / unit for value in curves[name]]
        style: dict[str, Any] = {
            "color": _COLOURS[n],
            "marker": _MARKERS[n],
            "markersize": 2.5,
            "linewidth": 1,
        }
        axis.plot(minutes, values, label=label, **style)
