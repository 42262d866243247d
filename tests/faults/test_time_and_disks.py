"""Clocks that jump, disks that are slow, file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from afa.files import staged, write_atomic
from afa.machine.ownership import owned
from tests.refusal import refusal
from tests.training.runs import recipe, steps_of

pytestmark = pytest.mark.processes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "aggregators.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.fault(
    "a clock that jumps",
    "train",
    how="the system time jumps by years, back and forth, at every query",
    holds="the same weights, bit for bit; no negative step times",
)
def test_the_time_of_day_does_not_matter(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_steps": 5, "checkpoint_every": 2, "log_every": 1, "trackers": ["tensorboard"]}
    list(steps_of(recipe(experts, **settings), tmp_path / "whole"))
    now, jumps = time.time(), itertools.cycle((1e8, -1e8, 0, 3e7, -5e8))
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    steps = list(steps_of(recipe(experts, **settings), tmp_path / "jumping"))
    assert all(0 <= step.seconds < 1000 for step in steps)
    assert same(tmp_path / "whole", tmp_path / "jumping")


@pytest.mark.fault(
    "a slow disk",
    "train",
    how="every fsync and every rename takes 50 ms, as on a network file system",
    holds="the same weights, bit for bit",
)
def test_a_slow_disk(experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_steps": 4, "checkpoint_every": 1}
    list(steps_of(recipe(experts, **settings), tmp_path / "whole"))
    count = itertools.count()
    for name in ("fsync", "replace"):
        function = getattr(os, name)

        def slow(*given: object, function: object = function) -> None:
            next(count)
            time.sleep(0.05)
            function(*given)  # type: ignore[operator]

        monkeypatch.setattr(os, name, slow)
    list(steps_of(recipe(experts, **settings), tmp_path / "slow"))
    assert next(count) > 10
    assert same(tmp_path / "whole", tmp_path / "slow")


@pytest.mark.fault(
    "a file system without locks",
    "any work folder",
    how="flock fails with ENOLCK",
    holds="one line that names the problem, before any work",
)
def test_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with refusal("AFA-FILE-003", "work'"), owned(tmp_path / "work"):
        pytest.fail("it went on")


@pytest.mark.fault(
    "a file system without locks",
    "any work folder",
    how="flock is not implemented (ENOSYS)",
    holds="a file with the process id is the lock: a second process is refused, and the lock file "
    "of a dead process is ignored",
)
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with owned(tmp_path):  # noqa: SIM117
        with refusal("AFA-FILE-002", str(tmp_path)), owned(tmp_path):
            pytest.fail("it went on")
    child = os.fork()
    if child == 0:
        with owned(tmp_path):
            os._exit(0)  # as if killed: nothing is let go of
    os.waitpid(child, 0)
    with owned(tmp_path):
        write_atomic(tmp_path / "file", "mine")


@pytest.mark.fault(
    "two processes in one folder",
    "train, evaluate, search",
    how="a second process starts while the first one runs",
    holds="the second process is refused in one line; the first one is not affected",
)
def test_two_at_once(tmp_path: Path) -> None:
    with owned(tmp_path):
        with refusal("AFA-FILE-002", str(tmp_path)), owned(tmp_path):
            pytest.fail("it went on")
        write_atomic(tmp_path / "file", "mine")
    with owned(tmp_path):
        assert (tmp_path / "file").read_text() == "mine"


def test_what_a_dead_process_left_beside_an_output_is_removed(tmp_path: Path) -> None:
    """And nothing else: not a living one's, nor anything that only looks like it."""
    left = tmp_path / ".out.abcd1234"
    left.mkdir()
    (left / ".lock").write_text("")
    (left / "large").write_text("x")
    mine = tmp_path / ".out.settings"
    mine.mkdir()
    other = tmp_path / ".out2.abcd1234"
    other.mkdir()
    with staged(tmp_path / "out") as living:
        living.write_text("1")
        with staged(tmp_path / "out") as second:
            second.write_text("2")
        assert living.exists()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [".out.settings", ".out2.abcd1234", "out"]
