"""Pictures of rivals that draw in their own way, and real scenes, as jobs of processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from afa.evaluation.work import Claim, Store, digest
from afa.files import read_json, write_atomic, write_png
from afa.studies.jobs import report_progress
from afa.zoo.scenes import parse_caption, placed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.evaluation.cost import Cost
    from afa.studies.results.rivals.rival import Rival

#: beside the pictures: settings, prompts and seed from which they were made
MADE_FROM = "made_from.json"
_BATCH = 16


def drawn_job(name: str, rival: Rival, captions: Sequence[str], seed: int, folder: Path) -> None:
    """Draw a rival's pictures of prompts as `afa evaluate` takes them, or resume.

    Raises:
        AfaError: if the folder has pictures of other settings, prompts, seeds or models.
    """
    from afa.evaluation.given import COSTS

    _claim(folder, {**rival.identity(), "captions": digest(list(captions)), "seed": seed}, name)
    if (folder / COSTS).exists():
        return
    batches = folder / "batches"
    batches.mkdir(parents=True, exist_ok=True)
    drawer = rival.open()
    for start in range(0, len(captions), _BATCH):
        note = batches / f"{start:06d}.json"
        numbers = range(start, min(start + _BATCH, len(captions)))
        if not note.exists():
            pictures, cost = drawer.draw([captions[n] for n in numbers], numbers, seed)
            for number, picture in zip(numbers, pictures, strict=True):
                write_png(folder / f"{number:06d}.png", picture)
            write_atomic(note, json.dumps(_of_batch(cost, len(numbers))) + "\n")
        report_progress(name, numbers[-1] + 1, len(captions))
    notes = [read_json(path) for path in sorted(batches.iterdir())]
    write_atomic(folder / COSTS, json.dumps(_mean(notes), indent=2) + "\n")


def _of_batch(cost: Cost, count: int) -> dict[str, Any]:
    memory = None if cost.peak_memory is None else cost.peak_memory / 2**20
    return {
        "count": count,
        "expert_calls": cost.expert_calls,
        "seconds": cost.seconds,
        "peak_memory_mib": memory,
    }


def _mean(notes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The cost of one picture."""
    count = sum(note["count"] for note in notes)
    seconds = sorted(note["seconds"] / note["count"] for note in notes)
    peaks = [note["peak_memory_mib"] for note in notes if note["peak_memory_mib"] is not None]
    return {
        "expert_calls": sum(note["expert_calls"] for note in notes) / count,
        "seconds": seconds[len(seconds) // 2],
        **({"peak_memory_mib": max(peaks)} if peaks else {}),
    }


def pairs_of(captions: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of objects in captions, left and right, each once."""
    scenes = [parse_caption(caption) for caption in captions]
    return sorted({(scene.left, scene.right) for scene in scenes})


def scenes_job(name: str, pairs: Sequence[tuple[str, str]], count: int, folder: Path) -> None:
    """Run `render_scenes` as a job."""
    render_scenes(pairs, count, folder)
    report_progress(name, count, count)


def render_scenes(pairs: Sequence[tuple[str, str]], count: int, folder: Path) -> None:
    """Render real scenes of pairs of objects; finished ones are not rendered again.

    Raises:
        AfaError: if the folder has scenes of other pairs.
    """
    record = folder.with_name(f"{folder.name}.json")
    identity = {"pairs": digest(list(pairs)), "count": count}
    Store(folder).claim([Claim(record, identity, "real scenes", (f"{folder.name}/*",))])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([7, count])
    for number in range(count):
        scene, path = placed(pairs, rng), folder / f"{number:06d}.png"
        if not path.exists():
            write_png(path, Image.fromarray(scene.render()))


def _claim(folder: Path, identity: dict[str, Any], what: str) -> None:
    Store(folder).claim([Claim(folder / MADE_FROM, identity, what, ("*.png",))])
