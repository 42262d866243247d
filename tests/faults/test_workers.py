"""Processes that help and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

from tests.faults.commands import training
from tests.refusal import refusal
from tests.training.runs import recipe, steps_of
from tests.warm import ENVIRONMENT, run_ranks

pytestmark = pytest.mark.processes


def pictures(folder: Path, count: int = 40) -> Path:
    """A folder of pictures with captions."""
    folder.mkdir()
    lines = []
    for n in range(count):
        Image.new("RGB", (16, 16), (n, 0, 0)).save(folder / f"{n}.png")
        lines.append(f'{{"file_name": "{n}.png", "text": "a fox"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.fault(
    "a worker that dies",
    "train, processes that read pictures",
    how="SIGKILL to one of two workers after the first steps",
    holds="exit code 2 and one line; finished steps are saved; the rerun ends with the weights of "
    "an undisturbed run",
)
def test_a_reader_that_is_killed(experts: list[Path], tmp_path: Path) -> None:
    results = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        command = training(folder, experts[:2], num_steps=30, checkpoint_every=5, batch_size=2)
        place = folder / "train.yaml"
        recipe = yaml.safe_load(place.read_text())
        data = {"folder": str(pictures(folder / "pictures")), "cache": False, "num_workers": 2}
        place.write_text(yaml.safe_dump({**recipe, "data": data}))
        if name == "killed":
            process = command.start()
            checkpoints = command.output / "checkpoints"
            wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), process)  # noqa: B023
            for reader in psutil.Process(process.pid).children()[:1]:
                reader.kill()
            _, said = process.communicate(timeout=300)
            assert (process.returncode, len(said.splitlines())) == (2, 1), said
            assert "[AFA-TRAIN-035]" in said
            assert "data.num_workers" in said
            assert any(checkpoints.iterdir())
        code, said = command.run()
        assert code == 0, said
        results.append(command.result()["aggregators.safetensors"])
    assert results[0] == results[1]


@pytest.mark.fault(
    "a path that is too long",
    "train, processes that read pictures",
    how="TMPDIR is so long that no socket can be created in it; torch then hangs without an error",
    holds="one line before the first step; with a path one byte shorter, training runs",
)
@pytest.mark.parametrize("is_too_long", [True, False])
def test_a_long_folder_for_temporary_files(
    is_too_long: bool, experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="afa-", dir="/tmp") as short:
        long = Path(short) / ("x" * (75 - len(short) - 1 + is_too_long))
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        data = {"folder": str(pictures(tmp_path / "pictures", 4)), "cache": False, "num_workers": 1}
        steps = steps_of(recipe(experts[:2], data, num_steps=1), tmp_path / "run")
        if is_too_long:
            with refusal("AFA-TRAIN-033", "75", str(long)):
                list(steps)
        else:
            assert len(list(steps)) == 1


def wait_for(ready: Any, process: Any) -> None:
    end = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.fault(
    "a worker that dies",
    "train, one of two processes by torchrun",
    how="SIGKILL to the second process after the first checkpoint",
    holds="the other process ends within a minute; the rerun ends with a complete ensemble",
)
def test_a_rank_that_is_killed(experts: list[Path], tmp_path: Path) -> None:
    command = training(tmp_path, experts[:2], num_steps=40, checkpoint_every=2)
    launched = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", "2", "-m", "afa", *command.arguments),
    ]
    environment = {**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    with (tmp_path / "log").open("w") as log:
        process: Any = subprocess.Popen(
            launched, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
    checkpoints = command.output / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and child.ppid() == process.pid
    ]
    assert ranks
    ranks[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    command.require_whole()
    for code, _, said in run_ranks(command.arguments):
        assert code == 0, said
    assert "aggregators.safetensors" in command.result()
