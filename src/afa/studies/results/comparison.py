"""The comparison of a test: prompts, noise, metrics and references that all of its rows share."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from afa.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PROMPTS, REFERENCES = "prompts.csv", "references"


def test_comparison(folder: Path, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but models and methods of a recipe of `afa evaluate`.

    Args:
        folder: has the prompts and the real scenes.
        drawn: sampling settings.
    """
    of_sets = [{"name": name, "weights": "zoo:clip"} for name in ("clip_t", "fid", "kid", "cmmd")]
    return {
        "prompts": {"drawbench": str(folder / PROMPTS)},
        "references": str(folder / REFERENCES),
        "sampling": dict(drawn),
        "metrics": ["scenes", *of_sets],
        "num_resamples": 100,
    }


def write_prompts(path: Path, prompts: Mapping[str, Sequence[str]]) -> Path:
    """Write prompts with their groups, as `afa evaluate` reads them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Prompts", "Category"])
    for group, captions in prompts.items():
        writer.writerows([caption, group] for caption in captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())
    return path
