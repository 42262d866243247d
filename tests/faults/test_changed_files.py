"""An expert's file that changes while it is in use."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import afa
from afa.drawing.pictures import draw
from afa.drawing.recorded import picture_recipe
from afa.loading.pipeline import with_parts
from afa.loading.trust.unchanged import require_unchanged
from tests.faults.commands import training
from tests.faults.test_workers import wait_for
from tests.refusal import refusal
from tests.training.runs import SMALL, recipe, steps_of

pytestmark = pytest.mark.processes

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copies(experts: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(expert, tmp_path / expert.name)) for expert in experts[:2]]


def write_into(file: Path) -> None:
    """Zeros where the last weights were, in the very same file."""
    with file.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"\0" * 1000)


def asked() -> Any:
    return picture_recipe(
        ensemble="x", identity="x", prompt="a", seed=0, steps=1, guidance=1, height=16, width=16
    )


def test_writing_into_a_file_changes_the_model_that_runs(copies: list[Path]) -> None:
    """Why any of this is needed: weights are mapped, not copied."""
    pipeline = afa.load_pipeline(copies)
    before = [parameter.clone() for parameter in pipeline.unet.experts[0].parameters()]
    write_into(copies[0] / WEIGHTS)
    after = list(pipeline.unet.experts[0].parameters())
    assert not all(map(torch.equal, before, after))


@pytest.mark.fault(
    "an expert's file changes",
    "generate",
    how="another process writes to the file while the ensemble is loaded",
    holds="no picture is saved; the error names the file",
)
@pytest.mark.parametrize("file", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors"])
def test_a_picture_of_changed_weights_is_not_kept(file: str, copies: list[Path]) -> None:
    pipeline = afa.load_pipeline(copies, SMALL)
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, asked())
    write_into(copies[0] / file)
    with refusal("AFA-LOAD-100", f"'{copies[0] / file}'"):
        draw(pipeline, asked())


def test_a_fusion_of_these_experts_is_watched_as_well(copies: list[Path]) -> None:
    """Methods of a comparison replace the denoiser, and share the mapped weights."""
    pipeline = afa.load_pipeline(copies)
    shared = with_parts(pipeline, {"unet": afa.EnsembleDenoiser(list(pipeline.unet.experts))})
    require_unchanged(shared)
    write_into(copies[1] / WEIGHTS)
    with refusal("AFA-LOAD-100", f"'{copies[1] / WEIGHTS}'"):
        require_unchanged(shared)


@pytest.mark.fault(
    "an expert's file changes",
    "train",
    how="another process writes to the file between two checkpoints",
    holds="no update computed from the changed file is saved; after the file is restored, the "
    "same command ends with the weights of an undisturbed run",
)
def test_nothing_is_saved_of_what_was_learnt_from_it(copies: list[Path], tmp_path: Path) -> None:
    settings = {"num_steps": 6, "checkpoint_every": 2}
    list(steps_of(recipe(copies, **settings), tmp_path / "whole"))
    file = copies[1] / WEIGHTS
    content = file.read_bytes()
    run = steps_of(recipe(copies, **settings), tmp_path / "run")
    for _ in range(3):
        next(run)
    write_into(file)
    with refusal("AFA-LOAD-100", f"'{file}'"):
        list(run)
    names = [place.name for place in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000002.safetensors"]
    with refusal("AFA-TRAIN-052", "SHA-256"):
        list(steps_of(recipe(copies, **settings), tmp_path / "run"))
    file.write_bytes(content)
    list(steps_of(recipe(copies, **settings), tmp_path / "run"))
    whole, again = (
        load_file(tmp_path / name / "aggregators.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.fault(
    "an expert's file is replaced",
    "train",
    how="another file is renamed to its name, as a download does",
    holds="the run continues with the loaded weights, to the same result; the ensemble then "
    "refuses the new file by its hash",
)
def test_a_file_that_is_replaced(copies: list[Path], tmp_path: Path) -> None:
    settings = {"num_steps": 4, "checkpoint_every": 2}
    list(steps_of(recipe(copies, **settings), tmp_path / "whole"))
    run = steps_of(recipe(copies, **settings), tmp_path / "run")
    next(run)
    file = copies[1] / WEIGHTS
    shutil.copyfile(copies[0] / WEIGHTS, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    list(run)
    whole, again = (
        load_file(tmp_path / name / "aggregators.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    with refusal("AFA-LOAD-082", "SHA-256"):
        afa.load_ensemble(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(
    "an expert's file is truncated",
    "train",
    how="it is truncated while it is in use, which causes SIGBUS",
    holds="the checkpoints are complete; the rerun names the file in one line",
)
def test_a_file_that_is_cut_short(copies: list[Path], tmp_path: Path) -> None:
    command = training(tmp_path, copies, num_steps=400, checkpoint_every=2)
    process = command.start()
    checkpoints = command.output / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), process)
    os.truncate(copies[1] / WEIGHTS, 4096)
    _, said = process.communicate(timeout=300)
    # the system ends it, or it has noticed first
    assert process.returncode in (-signal.SIGBUS, 2), said
    command.require_whole()
    code, said = command.run()
    assert (code, len(said.splitlines())) == (2, 1), said
    assert f"'{copies[1] / WEIGHTS}' is not a complete safetensors file" in said


def test_a_touch_is_a_change_and_reading_is_none(copies: list[Path]) -> None:
    pipeline = afa.load_pipeline(copies)
    (copies[0] / WEIGHTS).read_bytes()
    require_unchanged(pipeline)
    os.utime(copies[0] / WEIGHTS)
    with refusal("AFA-LOAD-100", f"'{copies[0] / WEIGHTS}'"):
        require_unchanged(pipeline)
