"""Small distillations that take a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.distilling.recipe import DistillRecipe
from afa.distilling.run import distill
from afa.training import TrainStep

if TYPE_CHECKING:
    from pathlib import Path


def as_written(folders: list[Path], prompts: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as it stands in a file: the mean of experts into the first, by four steps."""
    prompts.write_text("a fox\na red house\nthe sea\n")
    asked: dict[str, Any] = {
        "teacher": {"fusion": {"rule": "feature_mean"}},
        "experts": [str(folder) for folder in folders],
        "student": {"init": str(folders[0])},
        "trajectories": {
            "prompts": {"text": str(prompts)},
            "number": 5,
            "num_steps": [2, 3],
            "guidance": 3.0,
            "height": 16,
            "width": 16,
        },
        "recording": {"batch_size": 2},
        "training": {
            "num_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "num_warmup_steps": 0,
            "checkpoint_every": 1,
            "trackers": [],
            "device": "cpu",
        },
    }
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(asked.get(key), dict)
        is_section = is_section and key != "teacher"
        asked[key] = asked[key] | value if is_section else value
    return {key: value for key, value in asked.items() if value is not None}


def recipe(folders: list[Path], prompts: Path, **changes: Any) -> DistillRecipe:
    """The same, checked."""
    return DistillRecipe.model_validate(as_written(folders, prompts, **changes))


def steps_of(asked: DistillRecipe, output: Path) -> list[TrainStep]:
    """All steps of a run."""
    return [event for event in distill(asked, output) if isinstance(event, TrainStep)]


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files that must be the same after any interruption."""
    changing = {"environment.json", "metrics.jsonl"}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in changing and not file.name.startswith(".")
    }
