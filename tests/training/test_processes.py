"""Several processes, and processes that are killed: the commands that users run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from afa.loading.weights import hash_expert
from afa.training import Checkpoints
from tests.training.runs import as_written
from tests.warm import Running, run_ranks

pytestmark = pytest.mark.processes


def write(folder: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, output: Path) -> Running:
    return Running(["train", recipe, "--output", output])


def finish(process: Running, code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def train(recipe: Path, output: Path, num_processes: int = 1, **environment: str) -> None:
    ranks = run_ranks(["train", recipe, "--output", output], num_processes, environment)
    assert [code for code, *_ in ranks] == [0] * num_processes, ranks


def figures(run: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_are_one_with_twice_the_batch(
    experts: list[Path], tmp_path: Path, accumulated: int
) -> None:
    """The same samples in the same steps; float32 sums in another order, hence the tolerance."""
    common: dict[str, Any] = {"num_steps": 12, "log_every": 1, "ema_decay": 0.9}
    losses, validation, weights = [], [], []
    for name, num_processes, size, count in (
        ("one", 1, 4 * accumulated, 1),
        ("two", 2, 2, accumulated),
    ):
        recipe = as_written(experts, {"scenes": {"num_samples": 30}}, **common)
        recipe["training"] |= {"batch_size": size, "gradient_accumulation_steps": count}
        recipe["data"]["cache_folder"] = str(tmp_path / f"cache {name}")
        recipe["validation"] = {"num_samples": 6, "every": 4}
        output = tmp_path / name
        train(write(tmp_path, recipe, f"{name}.yaml"), output, num_processes)
        losses.append(figures(output, "loss"))
        validation.append(figures(output, "validation_loss"))
        weights.append(load_file(output / "aggregators.safetensors"))
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-2, atol=1e-3)


#: what `accelerate launch --use_fsdp --fsdp_version 2` sets
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.slow
def test_sharded_experts_train_alike(experts: list[Path], tmp_path: Path) -> None:
    recipe = as_written(
        experts,
        {"scenes": {"num_samples": 30}},
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        log_every=1,
    )
    recipe["validation"] = {"num_samples": 5, "every": 2}  # 3 batches for 2 processes
    recipe["previews"] = {"prompts": ["a fox"], "every": 4, "num_steps": 2}
    outputs = [tmp_path / "replicated", tmp_path / "sharded"]
    for output, environment in zip(outputs, ({}, SHARDED), strict=True):
        recipe["data"]["cache_folder"] = str(tmp_path / f"cache {output.name}")
        train(write(tmp_path, recipe), output, 2, **environment)
    for key in ("loss", "validation_loss"):
        whole, sharded = (figures(output, key) for output in outputs)
        assert sharded == pytest.approx(whole, rel=1e-5)
    assert (outputs[1] / "previews" / "step-00000004.png").is_file()
    weights = [load_file(output / "aggregators.safetensors") for output in outputs]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_each_process_holds_its_share_of_the_experts() -> None:
    for code, out, err in run_ranks([], module="tests.training.sharded"):
        assert code == 0, err
        assert out.count("all alike") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "environment", "code"),
    [
        ({}, {"FSDP_VERSION": "1"}, "AFA-TRAIN-029"),
        ({"offload_experts": True}, {}, "AFA-TRAIN-049"),
    ],
)
def test_sharding_that_cannot_be(
    experts: list[Path],
    tmp_path: Path,
    changes: dict[str, Any],
    environment: dict[str, str],
    code: str,
) -> None:
    recipe = as_written(experts, **changes)
    arguments = ["train", write(tmp_path, recipe), "--output", tmp_path / "run"]
    ranks = run_ranks(arguments, environment={**SHARDED, **environment})
    assert all(status for status, *_ in ranks)
    assert f"[{code}]" in "".join(err for *_, err in ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(
    "kill -9",
    "train",
    how="SIGKILL at a random moment, five times",
    holds="the same command resumes, and ends with the bits of an undisturbed run",
)
@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_bits(experts: list[Path], tmp_path: Path) -> None:
    """Once while it encodes, and at four moments of its steps that nobody chose."""
    recipe = as_written(
        experts,
        {"scenes": {"num_samples": 30}},
        num_steps=30,
        checkpoint_every=3,
        log_every=1,
        ema_decay=0.9,
    )
    recipe["aggregator"]["sites"] = "conv_out"
    before = [hash_expert(expert) for expert in experts]
    recipe["data"]["cache_folder"] = str(tmp_path / "cache whole")
    finish(start(write(tmp_path, recipe), tmp_path / "whole"))

    cache = tmp_path / "cache parts"
    recipe["data"]["cache_folder"] = str(cache)
    path, output = write(tmp_path, recipe), tmp_path / "parts"
    chance = random.Random(os.urandom(8))
    moments = [0, *sorted(chance.sample(range(1, 26), 4))]

    for moment in moments:
        process = start(path, output)
        deadline = time.monotonic() + 120
        while not (cache.exists() if moment == 0 else last_step(output) >= moment):
            assert process.poll() is None, (moments, process.communicate())
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (output / "aggregators.safetensors").exists(), moments
    finish(start(path, output))
    whole, parts = (tmp_path / n / "aggregators.safetensors" for n in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes(), moments
    assert [hash_expert(expert) for expert in experts] == before


def last_step(run: Path) -> int:
    """The last step that a run has written a line of; a line that is being written counts not."""
    place = run / "metrics.jsonl"
    found = place.read_text().split("\n")[:-1] if place.exists() else []
    return max((json.loads(line)["step"] for line in found), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_first(experts: list[Path], tmp_path: Path, number: signal.Signals) -> None:
    recipe = as_written(experts, num_steps=5000, checkpoint_every=5000, log_every=1)
    path, output = write(tmp_path, recipe), tmp_path / "run"
    process = start(path, output)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(figures(output, "loss")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said = finish(process, code=128 + number)
    assert "Run the same command again to resume." in " ".join(said.split())
    (checkpoint,) = (output / "checkpoints").iterdir()
    done = int(checkpoint.stem.removeprefix("step-"))
    assert 3 <= done < 5000
    recipe["training"]["num_steps"] = done + 1
    finish(start(write(tmp_path, recipe), output))
    assert (output / "aggregators.safetensors").exists()


@pytest.mark.fault(
    "SIGHUP",
    "train",
    how="the terminal in which it runs is closed; and the same under `nohup`",
    holds="exit code 129 after a checkpoint is saved; under `nohup` the training goes on",
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks beside threads
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_first(experts: list[Path], tmp_path: Path, ignored: bool) -> None:
    steps = 300 if ignored else 5000
    recipe = as_written(experts[:1], num_steps=steps, checkpoint_every=5000, log_every=1)
    recipe["aggregator"]["sites"] = "conv_out"
    path, output = write(tmp_path, recipe), tmp_path / "run"
    process, terminal = os.forkpty()
    if process == 0:  # pragma: no cover - becomes another program
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        command = [sys.executable, "-m", "afa", "train", str(path), "--output", str(output)]
        os.execv(sys.executable, command)
    deadline = time.monotonic() + 300
    while last_step(output) < 3:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), os.read(terminal, 10_000)
        assert time.monotonic() < deadline
        with suppress(BlockingIOError):
            os.set_blocking(terminal, False)
            os.read(terminal, 10_000)
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    done = Checkpoints(output / "checkpoints").steps()
    if ignored:
        assert os.waitstatus_to_exitcode(status) == 0
        assert done == [300]
        assert (output / "aggregators.safetensors").exists()
    else:
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
        assert len(done) == 1
        assert 3 <= done[0] < 5000


@pytest.mark.slow
def test_several_processes_end_early_together(experts: list[Path], tmp_path: Path) -> None:
    """Resumed from an earlier checkpoint, and continued with a lower rate: the same bytes."""
    recipe = as_written(
        experts[:2],
        {"scenes": {"num_samples": 40}, "cache_folder": str(tmp_path / "cache")},
        num_steps=30,
        learning_rate=0.05,
        checkpoint_every=3,
        ema_decay=0.5,
        gradient_accumulation_steps=2,
        early_stopping={"patience": 2, "min_improvement": 1e-3},
    )
    recipe["aggregator"]["sites"] = "conv_out"
    recipe["validation"] = {"num_samples": 5, "every": 2}
    slower = {**recipe, "training": {**recipe["training"], "learning_rate": 1e-3}}
    path, slow = write(tmp_path, recipe), write(tmp_path, slower, "slower.yaml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(path, whole, 2)
    last = last_step(whole)
    assert last < 30
    shutil.copytree(whole, parts)
    Checkpoints(parts / "checkpoints").places()[-1].unlink()
    for name in ("aggregators.safetensors", "config.json"):
        (parts / name).unlink()
    train(path, parts, 2)
    for output in (whole, parts):
        assert Checkpoints(output / "checkpoints").steps()[-1] == last
        ranks = run_ranks(["train", slow, "--output", output, "--continue-with"])
        assert [code for code, *_ in ranks] == [0, 0], ranks
    assert last_step(whole) > last
    ours, same = (output / "aggregators.safetensors" for output in (whole, parts))
    assert ours.read_bytes() == same.read_bytes()
    # one process with the same number of samples finds nothing left to do
    one = {**slower, "training": {**slower["training"], "batch_size": 4}}
    train(write(tmp_path, one, "one.yaml"), whole)
    assert ours.read_bytes() == same.read_bytes()
