"""What every picture of a comparison on emoji scenes shows, right or wrong, as files keep it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.evaluation.recipe import EvaluateRecipe
from afa.evaluation.results import read_results
from afa.files import write_atomic
from afa.provenance import commit
from afa.zoo.scenes import parse_caption

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from afa.statistics import Clusters


def outcomes_of(recipe: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The outcomes of a finished comparison.

    Args:
        recipe: of `afa evaluate`.
        output: its folder.

    Returns:
        Commit, machine, prompts with their groups, and rows: a string of zeros and ones for each
        training, and the evaluations of one expert's denoiser for a picture.
    """
    results = read_results(EvaluateRecipe.model_validate(recipe), output)
    every = list(range(len(results.prompts)))
    rows = {
        name: {
            "both": [bits_of(bits) for bits in results.scores_at(name, "both", every)],
            "calls": results.cost(name).expert_calls,
        }
        for name in results.methods
    }
    return {
        "commit": commit(),
        "machine": results.machines(),
        "prompts": [[prompt.text, prompt.group] for prompt in results.prompts],
        "rows": rows,
    }


def bits_of(values: Sequence[float]) -> str:
    """Outcomes as a string of zeros and ones."""
    return "".join(str(round(value)) for value in values)


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write outcomes as compact JSON, the rows on a line of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    write_atomic(path, text.replace('"rows":', '\n"rows":') + "\n")


def clusters_of(captions: Iterable[str]) -> Clusters:
    """The cluster of each prompt: prompts of the same pair of objects depend on each other."""
    scenes = [parse_caption(caption) for caption in captions]
    pairs = ["+".join(sorted((scene.left, scene.right))) for scene in scenes]
    return np.unique(pairs, return_inverse=True)[1].astype(np.int64)


def replace_between(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what is between the marks of a name in a page."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    write_atomic(path, before + "\n".join([begin, "", *lines, "", end]) + after)
