"""Processes that are ended: at once by SIGKILL, or asked to by SIGTERM."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Command, distilling, evaluating, generating, merging, training
from tests.faults.test_writes import made

pytestmark = pytest.mark.processes


def kill_when(process: Any, ready: Any, number: int) -> tuple[int, str]:
    """Send a signal as soon as something is the case; the exit code and what was said."""
    end = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.002)
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        raise AssertionError("it was quicker") from None
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.fault(
    "kill -9",
    "generate",
    how="SIGKILL after the first, the second and the third picture",
    holds="finished pictures are kept and not drawn again; the rerun's pictures are identical bit "
    "for bit",
)
def test_pictures_that_were_drawn_stay(experts: list[Path], tmp_path: Path) -> None:
    earlier = training(tmp_path, experts[:2], num_steps=1)
    assert earlier.run()[0] == 0
    (tmp_path / "whole").mkdir()
    whole = generating(tmp_path / "whole", earlier.output, num_images=5)
    assert whole.run()[0] == 0
    command = generating(tmp_path, earlier.output, num_images=5)
    times: dict[str, int] = {}
    for count in (1, 2, 3):
        process = command.start()

        def enough(count: int = count) -> bool:
            return len(list(command.output.glob("*[0-9].png"))) >= count

        code, _ = kill_when(process, enough, signal.SIGKILL)
        assert code == -signal.SIGKILL
        command.require_whole()
        for place in command.output.glob("*.png"):
            changed = place.stat().st_mtime_ns
            if place.name[:-4] + "-weights.png" in os.listdir(command.output):
                assert times.setdefault(place.name, changed) == changed
    assert command.run()[0] == 0
    assert command.result() == whole.result()
    assert len(whole.result()) == 5
    again, said = command.run()  # and once more, with nothing left to do
    assert again == 0, said


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9",
    "merge",
    how="SIGKILL at three random moments while tensors are written",
    holds="no file has the output's name; the rerun removes temporary files and produces the same "
    "result",
)
def test_a_merge_that_is_killed(experts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = merging(tmp_path / "whole", experts)
    assert whole.run()[0] == 0
    command, dice = merging(tmp_path, experts), random.Random(0)
    for _ in range(3):
        size, left = dice.randrange(1, 100_000), set(tmp_path.glob(".merged.*"))

        def begun(size: int = size, left: set[Path] = left) -> bool:
            for workplace in set(tmp_path.glob(".merged.*")) - left:
                for file in workplace.rglob("*.safetensors"):
                    with suppress(FileNotFoundError):  # it has its final name by now
                        if file.stat().st_size > size:
                            return True
            return False

        try:
            code, _ = kill_when(command.start(), begun, signal.SIGKILL)
        except AssertionError:  # it was quicker than that
            assert command.output.exists()
            break
        assert code == -signal.SIGKILL
        assert not command.output.exists()
        assert command.left_over()
    if not command.output.exists():
        assert command.run()[0] == 0
    assert command.result() == whole.result()
    assert not command.left_over()


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9",
    "distill",
    how="SIGKILL at five moments: after the first and the second recorded batch, and after the "
    "first, the second and the third checkpoint",
    holds="recorded batches are kept and not recorded again; the rerun ends with the same bytes as "
    "an undisturbed run",
)
def test_a_distillation_that_is_killed(experts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    changes: dict[str, Any] = {
        "training": {
            "num_steps": 40,
            "batch_size": 8,
            "checkpoint_every": 10,
        },
        "validation": {"num_samples": 2, "every": 10},
    }
    whole = distilling(tmp_path / "whole", experts[:2], **changes)
    assert whole.run()[0] == 0
    command = distilling(tmp_path, experts[:2], **changes)
    recorded, checkpoints = "recorded/trajectories/*.safetensors", "checkpoints/*.safetensors"
    times: dict[str, int] = {}
    for pattern, name in (
        (recorded, "000000"),
        (recorded, "000001"),
        (checkpoints, "step-00000010"),
        (checkpoints, "step-00000020"),
        (checkpoints, "step-00000030"),
    ):

        def enough(pattern: str = pattern, name: str = name) -> bool:
            return name in {place.stem for place in command.output.glob(pattern)}

        code, _ = kill_when(command.start(), enough, signal.SIGKILL)
        assert code == -signal.SIGKILL
        command.require_whole()
        for place in command.output.glob(recorded):
            changed = place.stat().st_mtime_ns
            assert times.setdefault(place.name, changed) == changed
    assert command.run()[0] == 0
    assert command.result() == whole.result()
    assert len(whole.result()) > 8


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM",
    "train, distill, generate, merge, evaluate",
    how="sent after the command has begun to write; SIGHUP likewise for distill and merge",
    holds="exit code 143 (129 after SIGHUP); no partial files are left; the rerun ends with the "
    "result of an undisturbed run",
)
@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGTERM) for name in ("train", "distill", "generate", "merge", "evaluate")),
        *((name, signal.SIGHUP) for name in ("distill", "merge")),
    ],
)
def test_asked_to_end(
    name: str, number: signal.Signals, experts: list[Path], tmp_path: Path
) -> None:
    commands: list[Command] = []
    for folder in ("whole", "ended"):
        (tmp_path / folder).mkdir()
        commands.append(made(name, tmp_path / folder, experts))
    whole, command = commands
    assert whole.run()[0] == 0

    def begun() -> bool:
        inside = [*command.output.rglob("*"), *command.output.parent.glob(".merged.*/**/*")]
        return any(file.is_file() for file in inside)

    code, said = kill_when(command.start(), begun, number)
    assert code == 128 + number, said
    assert "Traceback" not in said
    command.require_whole()
    if name not in ("train", "distill"):  # which keep their checkpoints
        assert not command.left_over()
    assert command.run()[0] == 0
    if name == "train":
        settled = "aggregators.safetensors"
        assert command.result()[settled] == whole.result()[settled]
    else:
        assert command.result() == whole.result()


def test_the_makers_are_what_they_say(experts: list[Path], tmp_path: Path) -> None:
    """Every command of these tests writes where they look."""
    for make in (training, merging, evaluating):
        command = make(tmp_path, experts)
        assert str(command.output) in command.arguments
