"""Find the runs below a folder, and how far each is, without changing anything."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from afa.errors import AfaError
from afa.evaluation.work import MARK_FILE
from afa.files import read_json
from afa.loading.student_record import RECORD
from afa.machine.ownership import is_owned
from afa.training.checkpoints import Checkpoints
from afa.training.continuing import RECIPE
from afa.training.exported import CHECKPOINTS
from afa.training.record import EARLY, METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

_RUNNING, _FINISHED, _INTERRUPTED, _BROKEN = "running", "finished", "interrupted", "broken"
#: of runs whose files do not tell whether they are finished
_STOPPED = "not running"


@dataclass
class Run:
    """A run folder.

    Attributes:
        path: the folder.
        kind: `training`, `distillation`, `tuned base`, `evaluation` or `search`.
        state: `running`, `finished`, `interrupted`, `not running` or `broken`.
        step: number of steps that are done; None if it has no steps.
        num_steps: total number of steps; None if it is not known.
        loss: mean loss of the last line of metrics.jsonl.
        validation_loss: the last one.
        lowest_validation_loss: and its minimum.
        checkpoints: steps of the checkpoints.
        num_bytes: size on disk.
        changed: local time of the last change of a file, as ISO 8601.
        error: why it is broken.
    """

    path: str
    kind: str
    state: str = _STOPPED
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    lowest_validation_loss: float | None = None
    checkpoints: list[int] = field(default_factory=list)
    num_bytes: int = 0
    changed: str = ""
    error: str | None = None


def find_runs(folder: Path) -> Iterator[Run]:
    """Yield the runs in a folder and its subfolders, in the order of their paths.

    Links to folders are not followed, and hidden folders are ignored.
    """
    for place, folders, _ in os.walk(folder):
        run = describe_run(Path(place))
        if run is not None:
            folders.clear()
            yield run
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def describe_run(folder: Path) -> Run | None:
    """Describe a run folder; None for another folder."""
    try:
        found = _describe(folder)
    except AfaError as error:
        found = Run(str(folder), "unknown", _BROKEN, error=str(error))
    if found is None:
        return None
    found.num_bytes, last = _size_of(folder)
    found.changed = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(last))
    if found.state != _BROKEN and is_owned(folder):
        found.state = _RUNNING
    return found


def _describe(folder: Path) -> Run | None:
    if (folder / MARK_FILE).is_file():
        state = _FINISHED if (folder / "report.json").is_file() else _INTERRUPTED
        return Run(str(folder), "evaluation", state)
    if (folder / "search.json").is_file() and (folder / "study.log").is_file():
        return Run(str(folder), "search")
    steps = Checkpoints(folder / CHECKPOINTS).steps()
    has_steps = bool(steps) or (folder / METRICS).is_file()
    for name in (RECIPE, "run.json"):
        if not (folder / name).is_file():
            continue
        try:
            recipe = read_json(folder / name)
        except AfaError:
            if has_steps:
                raise
            continue  # of another program
        training = recipe.get("training")
        if not isinstance(training, dict) or not isinstance(training.get("num_steps"), int):
            continue
        return _training(folder, recipe, name, steps)
    if has_steps:
        missing = f"'{folder}' has checkpoints or {METRICS}, but no {RECIPE}."
        return Run(str(folder), "unknown", _BROKEN, checkpoints=steps, error=missing)
    return None


def _training(folder: Path, recipe: dict[str, Any], name: str, steps: list[int]) -> Run:
    """Describe the folder of `afa train`, `afa distill` or a tuned base."""
    kind, result = "tuned base", "model_index.json"
    if name == RECIPE:
        is_distilled = "teacher" in recipe
        kind = "distillation" if is_distilled else "training"
        result = RECORD if is_distilled else "config.json"
    run = Run(str(folder), kind, _INTERRUPTED, num_steps=recipe["training"]["num_steps"])
    run.checkpoints, run.step = steps, max(steps, default=0)
    ended = _read_metrics(folder, run)
    is_done = run.step >= (run.num_steps or 0) or run.step in ended
    if is_done and (folder / result).is_file():
        run.state = _FINISHED
    elif is_owned(folder):
        run.step = max([run.step, *ended, *_last_step(folder)])
    with suppress(IndexError):
        newest = Checkpoints(folder / CHECKPOINTS).places()[-1]
        try:
            with safe_open(newest, framework="np") as file:
                file.metadata()
        except (OSError, SafetensorError) as error:
            if newest.exists():  # a running training deletes old ones
                run.state, run.error = _BROKEN, f"'{newest}' cannot be read: {error}"
    return run


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of metrics.jsonl with losses."""
    with suppress(OSError), (folder / METRICS).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if "loss" in line or EARLY in line:
                with suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                        yield entry


def _read_metrics(folder: Path, run: Run) -> list[int]:
    """Add the losses to a run; returns the steps after which it ended early."""
    ended = []
    for entry in _lines(folder):
        loss, validation = entry.get("loss"), entry.get("validation_loss")
        if isinstance(loss, float):
            run.loss = loss
        if isinstance(validation, float):
            lowest = run.lowest_validation_loss
            run.validation_loss = validation
            run.lowest_validation_loss = validation if lowest is None else min(validation, lowest)
        if EARLY in entry:
            ended.append(entry["step"])
    return ended


def _last_step(folder: Path) -> list[int]:
    return [max((entry["step"] for entry in _lines(folder)), default=0)]


def _size_of(folder: Path) -> tuple[int, float]:
    """Return the total size of all files in bytes, and the time of the last change."""
    size, last = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # deleted meanwhile
                found = os.lstat(os.path.join(place, name))
                size, last = size + found.st_size, max(last, found.st_mtime)
    return size, last
