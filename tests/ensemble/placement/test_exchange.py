"""Experts spread over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.ensemble.test_ensemble import ensemble_of
from tests.refusal import refusal
from tests.warm import run_ranks

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_spread_experts_compute_the_same(count: int) -> None:
    ranks = run_ranks([], count, module="tests.spread")
    assert f"all alike over {count}" in "".join(out for _, out, _ in ranks), ranks


def test_there_must_be_processes() -> None:
    with refusal("AFA-ENSEMBLE-036", "torchrun"):
        ensemble_of().spread_experts()


@pytest.mark.slow
def test_pictures_are_shared_by_processes(tmp_path: Path) -> None:
    """And are what one process draws."""
    pictures = []
    for count in (2, 1):
        output = tmp_path / str(count)
        options = ["--output", output, "--steps", 2, "--num-images", 2]
        ranks = run_ranks(["generate", "zoo:ensemble", "a fox", "a bee", *options], count)
        assert not any(code for code, *_ in ranks), ranks
        assert "".join(out for _, out, _ in ranks).count("4 pictures in") == 1
        files = sorted(output.iterdir())
        assert len(files) == 4
        pictures.append([(file.name, Image.open(file).tobytes()) for file in files])
    assert pictures[0] == pictures[1]
