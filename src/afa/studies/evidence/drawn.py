"""Pictures of rivals that draw in their own way, and real scenes, as jobs of processes."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from afa.files import read_json, write_atomic
from afa.studies.results.jobs import report_progress
from afa.zoo.scenes import BACKGROUNDS, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.evaluation.cost import Cost
    from afa.studies.evidence.rivals.rival import Rival

_BATCH = 16
_JITTER = (2, 8)  # pixels, as in the scenes of training


def drawn_job(name: str, rival: Rival, captions: Sequence[str], seed: int, folder: Path) -> None:
    """Draw a rival's pictures of prompts as `afa evaluate` takes them, or resume."""
    from afa.evaluation.given import COSTS

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
                _write(picture, folder / f"{number:06d}.png")
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


def scenes_job(name: str, pairs: Sequence[tuple[str, str]], count: int, folder: Path) -> None:
    """Render real scenes of pairs of objects, independent of all prompts."""
    if folder.exists() and len(list(folder.iterdir())) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([7, count])
    x, y = _JITTER
    for number in range(count):
        left, right = pairs[int(rng.integers(len(pairs)))]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        offsets = [(int(rng.integers(-x, x + 1)), int(rng.integers(-y, y + 1))) for _ in range(2)]
        scene = Scene(left, right, background, (offsets[0], offsets[1]))
        _write(Image.fromarray(scene.render()), folder / f"{number:06d}.png")
    report_progress(name, count, count)


def _write(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
