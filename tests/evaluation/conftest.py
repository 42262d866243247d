"""A small comparison of the zoo's experts that takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL: dict[str, Any] = {
    "experts": ["zoo:animals", "zoo:food"],
    "base": "zoo:base",
    "prompts": {"zoo": {"kinds": {"mixed": 3, "animals": 2}}},
    "methods": [
        {"name": "AFA", "fusion": {"rule": "feature_mean"}},
        {"name": "expert: animals", "model": "zoo:animals"},
        {"name": "expert: food", "model": "zoo:food"},
        {"name": "shell: animals", "fusion": {"rule": "shell", "expert": 0}},
        {"name": "shell: food", "fusion": {"rule": "shell", "expert": 1}},
        {"name": "weighted merge", "merge": {"method": "weighted", "weights": [0.5, 0.5]}},
    ],
    "sampling": {
        "num_steps": 2,
        "guidance": 3,
        "batch_size": 2,
        "seeds": [0, 1],
        "num_threads": 1,
    },
    "metrics": [
        "scenes",
        {"name": "clip_t", "weights": "zoo:clip"},
        {"name": "clip_i", "weights": "zoo:clip"},
        {"name": "fid", "weights": "zoo:clip"},
    ],
    "curve": {"num_steps": [1, 2], "limit": 2},
    "num_resamples": 200,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe: the small one with these keys changed; None takes a key out."""

    def write_recipe(**changes: Any) -> Path:
        recipe = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write_recipe
