"""The comparison of a test: prompts, noise, metrics and references that all of its rows share."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from afa.files import write_atomic
from afa.studies.results.plan import sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from afa.studies.evidence.settings import EvidenceSettings

PROMPTS, REFERENCES = "prompts.csv", "references"


def test_comparison(
    folder: Path, prompts: Mapping[str, Sequence[str]], settings: EvidenceSettings
) -> dict[str, Any]:
    """Everything but models and methods of a recipe of `afa evaluate`; writes the prompts.

    Args:
        folder: gets the prompts; has the real scenes.
        prompts: by group.
        settings: of the study.
    """
    of_sets = [{"name": name, "weights": "zoo:clip"} for name in ("clip_t", "fid", "kid", "cmmd")]
    return {
        "prompts": {"drawbench": str(write_prompts(folder / PROMPTS, prompts))},
        "references": str(folder / REFERENCES),
        "sampling": {**sampling(settings.num_steps), "seeds": [settings.test_seed]},
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
