"""Experts spread over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from afa.errors import AfaError
from tests.test_ensemble import ensemble_of


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_spread_experts_compute_the_same(count: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={count}", "-m", "tests.spread"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert f"all alike over {count}" in done.stdout, done.stderr[-3000:]


def test_there_must_be_processes() -> None:
    with pytest.raises(AfaError, match="and there are none"):
        ensemble_of().spread_experts()


@pytest.mark.slow
def test_pictures_are_shared_by_processes(tmp_path: Path) -> None:
    """And are what one process draws."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    pictures = []
    for name, start in {"two": launcher, "one": []}.items():
        command = [
            sys.executable,
            "-m",
            *start,
            "afa",
            "generate",
            "zoo:ensemble",
            "a fox",
            "a bee",
        ]
        options = ["--output", tmp_path / name, "--steps", "2", "--num-images", "2"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*command, *map(str, options)], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("4 pictures in") == 1
        files = sorted((tmp_path / name).iterdir())
        assert len(files) == 4
        pictures.append([(file.name, Image.open(file).tobytes()) for file in files])
    assert pictures[0] == pictures[1]
