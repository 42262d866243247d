"""The result of a soak test, as a part of the page on reliability."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from benchmarks.soak.loop import PLOT, SUMMARY
from benchmarks.soak.verdict import BYTES
from tools.parts import write_part

if TYPE_CHECKING:
    from pathlib import Path

_CURVES = {
    "anonymous": "anonymous resident memory, without the safetensors leak",
    "allocated": "memory allocated by the C library",
    "blocks": "Python memory blocks, without the safetensors leak",
    "objects": "Python objects",
    "maps": "memory maps",
    "fds": "file descriptors",
    "threads": "threads",
    "children": "child processes",
    "tensors": "tensors",
    "tensor_bytes": "size of the tensors",
    "cached": "entries in afa's caches",
    "deleted": "memory maps of deleted files",
    "disk": "size of the work folder",
    "unseen": "uncaught exceptions in finalizers and threads",
}


def publish(folder: Path, docs: Path) -> None:
    """Copy the plot and the figures of a soak test to the pages, and write its table.

    Args:
        folder: The output folder of the soak test.
        docs: The folder with `reliability.md`.
    """
    shutil.copyfile(folder / PLOT, docs / "images" / PLOT)
    shutil.copyfile(folder / SUMMARY, docs / SUMMARY)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    write_part(docs / "reliability.md", "soak", as_page(summary))


def as_page(summary: dict[str, Any]) -> str:
    """Format the summary of a soak test as Markdown."""
    rows = [
        "| measured after every round | maximum in the first third | maximum in the last third | "
        "allowed growth | growth, upper bound | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for found in summary["findings"]:
        curve = found["curve"]
        keys = ("before", "after", "limit", "at_most")
        figures = " | ".join(_figure(curve, max(found[key], 0)) for key in keys)
        rows.append(f"| {_CURVES[curve]} | {figures} | {found['outcome']} |")
    return "\n".join(
        [
            f"Last run: {summary['date']}, commit `{summary['commit'][:7]}` "
            f"({summary['machine']}): {summary['rounds']} rounds in {summary['minutes']:.0f} "
            f"minutes. The first {summary['warm_up']} rounds are warm-up. The upper bound is the "
            "upper end of a slope's 95 % interval.",
            "",
            "![Memory, objects and descriptors of one process over an hour](images/soak.png)",
            "",
            *rows,
        ]
    )


def _figure(curve: str, value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if curve in BYTES else f"{value:,.0f}"
