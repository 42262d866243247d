"""An ensemble whose configuration asks for more than any machine has."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import afa
from tests.refusal import refusal
from tests.training.runs import SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**20, "hidden_ratio": None, "min_scale": 1},
        {"hidden_size": 2**20, "num_layers": 2**20, "hidden_ratio": 1e6},
        {"num_layers": 10**9},
    ],
)
def test_nothing_is_built_that_cannot_be(
    changes: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "ensemble"
    afa.save_ensemble(afa.load_pipeline(experts, SMALL), folder)
    config = json.loads((folder / "config.json").read_text())
    config["aggregator"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    with refusal("AFA-FUSION-001"):
        afa.load_ensemble(folder)
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()


def test_settings_that_do_not_fit_the_weights(experts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "ensemble"
    afa.save_ensemble(afa.load_pipeline(experts, SMALL), folder)
    config = json.loads((folder / "config.json").read_text())
    config["aggregator"]["num_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with refusal("AFA-LOAD-018", "ensemble's"):
        afa.load_ensemble(folder)
