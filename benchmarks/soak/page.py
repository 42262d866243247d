"""What a soak came to, as a part of the page on reliability."""

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
    "anonymous": "resident memory that is no file's, without what safetensors loses",
    "allocated": "memory that the C library has given out",
    "blocks": "blocks of Python's memory, without what safetensors loses",
    "objects": "Python objects",
    "maps": "maps of memory",
    "fds": "file descriptors",
    "threads": "threads",
    "children": "child processes",
    "tensors": "tensors",
    "tensor_bytes": "their bytes",
    "cached": "entries in afa's caches",
    "deleted": "maps of removed files",
    "disk": "the work folder",
    "unseen": "errors that nobody could catch",
}


def publish(folder: Path, docs: Path) -> None:
    """Put the plot, the figures and the table of a soak among the pages.

    Args:
        folder: of the soak.
        docs: with `reliability.md`.
    """
    shutil.copyfile(folder / PLOT, docs / "images" / PLOT)
    shutil.copyfile(folder / SUMMARY, docs / SUMMARY)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    write_part(docs / "reliability.md", "soak", as_page(summary))


def as_page(summary: dict[str, Any]) -> str:
    """A soak's summary in Markdown."""
    rows = [
        "| after every round | highest of the first third | of the last | may grow by | grew by at "
        "most | |",
        "|---|---|---|---|---|---|",
    ]
    for found in summary["findings"]:
        curve = found["curve"]
        keys = ("before", "after", "limit", "at_most")
        figures = " | ".join(_figure(curve, max(found[key], 0)) for key in keys)
        rows.append(f"| {_CURVES[curve]} | {figures} | {found['outcome']} |")
    return "\n".join(
        [
            f"{summary['rounds']} rounds in {summary['minutes']:.0f} minutes, of which the first "
            f"{summary['warm_up']} are warm-up, on {summary['date']} at `{summary['commit'][:7]}` "
            f"({summary['machine']}). A slope counts by the upper end of its 95 % interval.",
            "",
            "![Memory, objects and descriptors of one process over an hour](images/soak.png)",
            "",
            *rows,
        ]
    )


def _figure(curve: str, value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if curve in BYTES else f"{value:,.0f}"
