"""Memory that runs out: said with a figure, before the work where it can be told, or in it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from afa.machine.exhausted import is_exhausted, saying_what_fits, smaller_batch
from afa.preflight.run import look
from afa.training.planned import plan_of_training
from afa.training.recipe import load_recipe
from tests.refusal import refusal
from tests.warm import ENVIRONMENT

pytestmark = pytest.mark.processes

_MB = 2**20


def recipe_of(folder: Path, batch_size: int, resolution: int = 64) -> Path:
    """A training of the zoo's experts."""
    recipe: dict[str, Any] = {
        "experts": ["zoo:animals", "zoo:food", "zoo:things"],
        "data": {"scenes": {"num_samples": 512}, "resolution": resolution, "cache": False},
        "training": {"num_steps": 1, "batch_size": batch_size, "device": "cpu", "trackers": []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def limited(arguments: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """A command that may have so many bytes of address space."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT, "MALLOC_ARENA_MAX": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        capture_output=True,
        text=True,
    )


@pytest.mark.nightly
@pytest.mark.fault(
    "out of memory",
    "train, before it begins",
    how="a batch that needs more memory than the process may use",
    holds="refused before any work, with a batch size that fits; that batch size does fit",
)
def test_what_does_not_fit_is_said_before(tmp_path: Path) -> None:
    place = recipe_of(tmp_path, 400)
    size = 6000 * _MB
    command = ["-m", "afa", "train", str(place), "--output", str(tmp_path / "run")]
    done = limited(command, size)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert "AFA-CHECK-002" in lines[0]
    assert not (tmp_path / "run").exists()
    fitting = int(lines[0].split("batch_size: ")[1].split(" ")[0])
    times = int(lines[0].split("gradient_accumulation_steps: ")[1].split(",")[0])
    assert 0 < fitting < 400 <= fitting * times
    recipe_of(tmp_path, max(fitting // 2, 1))  # half, for what threads of libraries map besides
    done = limited(command, size)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.fault(
    "out of memory",
    "train, in a step",
    how="the process may use less memory than a step needs; --no-check",
    holds="one line with a smaller batch size and the accumulation that keeps the samples per "
    "step; exit code 2",
)
def test_a_step_that_does_not_fit(tmp_path: Path) -> None:
    place = recipe_of(tmp_path, 400)
    arguments = ["train", str(place), "--output", str(tmp_path / "run"), "--no-check"]
    done = limited(["-m", "afa", *arguments], 6000 * _MB)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert "AFA-MEMORY-004" in lines[0]
    assert "A batch of 400 samples" in lines[0]
    assert "training.batch_size: 200 and gradient_accumulation_steps: 2" in lines[0]


def test_the_estimate_is_of_the_batch(tmp_path: Path) -> None:
    reports = [look(plan_of_training(load_recipe(recipe_of(tmp_path, n)))) for n in (8, 64)]
    small, large = (report.estimates["training"].takes for report in reports)
    assert large > small + 10 * _MB


@pytest.mark.parametrize(
    ("size", "accumulation", "said"),
    [
        (8, 1, "Set b: 4 and gradient_accumulation_steps: 2, which is equivalent. Else."),
        (7, 3, "Set b: 3 and gradient_accumulation_steps: 7, which is equivalent. Else."),
        (8, None, "Set b: 4. Else."),
        (1, 1, "Else."),
    ],
)
def test_the_remedy(size: int, accumulation: int | None, said: str) -> None:
    assert smaller_batch(size, "b", accumulation, "Else.")() == said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 21474836480 bytes. Error code 12 (Cannot allocate memory)"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."),
        MemoryError(),
        RuntimeError("could not create a primitive"),
    ],
)
def test_what_the_libraries_say_of_it(error: Exception) -> None:
    assert is_exhausted(error)
    with (
        refusal("AFA-MEMORY-004", "^It does not fit", r"Rest\.$"),
        saying_what_fits("It", lambda: "Rest."),
    ):
        raise error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="something else"), saying_what_fits("It", str):
        raise RuntimeError("something else")
