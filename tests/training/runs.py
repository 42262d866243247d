"""Small trainings that take a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import afa
from afa.training import Recipe, TrainStep, seeded, train

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "norm_num_groups": 4}
SMALL = afa.SABWConfig(**SIZES)


def recipe(experts: list[Path], data: Any = None, **training: Any) -> Recipe:
    """A recipe with these settings of the training changed."""
    return Recipe.model_validate(as_written(experts, data, **training))


def as_written(experts: list[Path], data: Any = None, **training: Any) -> dict[str, Any]:
    """The same, as it stands in a file."""
    return {
        "experts": [str(expert) for expert in experts],
        "data": data or {"scenes": {"num_samples": 100}},
        "aggregator": dict(SIZES),
        "training": {
            "num_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "num_warmup_steps": 0,
            "checkpoint_every": 1,
            "trackers": [],
            "device": "cpu",
            **training,
        },
    }


def steps_of(asked: Recipe, output: Path) -> Iterator[TrainStep]:
    """The steps of a run, without the progress of its cache."""
    return (event for event in train(asked, output) if isinstance(event, TrainStep))


def fresh(experts: list[Path]) -> Any:
    """A pipeline whose aggregators begin as those of a run do."""
    with seeded(0):
        return afa.load_pipeline(experts, SMALL)
