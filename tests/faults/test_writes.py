"""Every write of every command fails once: one line, nothing half, and the rerun is the same."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afa.files import write_atomic
from tests import warm
from tests.faults.commands import (
    Command,
    distilling,
    evaluating,
    generating,
    merging,
    pruning,
    training,
)

pytestmark = pytest.mark.processes

MAKERS = ("train", "distill", "generate", "merge", "evaluate", "prune")
#: commands of many writes: a minute and more each
_NIGHTLY = dict.fromkeys(("train", "distill", "generate", "evaluate"), pytest.mark.nightly)


def made(name: str, root: Path, experts: list[Path]) -> Command:
    if name in ("generate", "prune"):
        earlier = training(root, experts[:2], num_steps=1)
        assert earlier.run()[0] == 0
        ensemble = earlier.output.rename(root / "trained")
        return generating(root, ensemble) if name == "generate" else pruning(root, ensemble)
    makers: Any = {
        "train": training,
        "distill": distilling,
        "merge": merging,
        "evaluate": evaluating,
    }
    return makers[name](root, experts[:2])


@pytest.mark.slow
@pytest.mark.fault(
    "full disk",
    "train, distill, generate, merge, evaluate, prune",
    how="each write of the command in turn, and all writes after it, fail with ENOSPC",
    holds="exit code 2 and one line; every file with its final name is complete; the rerun ends "
    "with the bytes of an undisturbed run",
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_NIGHTLY.get(name, ())) for name in MAKERS]
)
def test_every_write_fails_once(name: str, experts: list[Path], tmp_path: Path) -> None:
    root, told = tmp_path / "root", tmp_path / "told"
    for folder in (root, told):
        folder.mkdir()
    command = made(name, root, experts)
    given = [root, told / "runs", "--", *command.arguments]
    code, _, said = warm.run(given, module="tests.faults.failing_writes")
    assert code == 0, said
    whole, *failed = map(json.loads, (told / "runs").read_text().splitlines())
    assert whole["code"] == 0, whole["said"]
    assert len(failed) == len(whole["writes"]) > 1

    def result(folder: str) -> dict[str, str]:
        place = told / folder / command.output.relative_to(root)
        return replace(command, output=place).result()

    expected = result("runs.whole")
    assert expected
    for run in failed:
        what, lines = (run["write"], run["what"]), run["said"].splitlines()
        assert run["code"] == 2, (what, run["said"])
        assert len(lines) == 1, (what, run["said"])
        assert "No space left" in lines[0], what
        place = told / f"failed{run['write']}" / command.output.relative_to(root)
        replace(command, output=place).require_whole()
        assert run["again"][0] == 0, (what, run["again"])
        assert result(f"again{run['write']}") == expected, what
        left = replace(command, output=told / f"again{run['write']}" / command.output.name)
        assert not left.left_over(), what


@pytest.mark.fault(
    "full disk",
    "writing one file",
    how="the kernel limits a file to 100 kB, so the write stops in the middle",
    holds="the previous file is unchanged; no other file is left",
)
def test_a_write_that_stops_in_the_middle(tmp_path: Path) -> None:
    place = tmp_path / "file"
    write_atomic(place, b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(place, b"x" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert place.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        # CI may mount one; elsewhere the test above, where every write fails once, has to do
        pytest.skip("mounting a file system requires root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.fault(
    "full disk",
    "train",
    how="a file system of 3 MB, filled up to the last 100 kB, then emptied again",
    holds="exit code 2 and one line; the same command resumes to the result of an undisturbed run",
)
def test_a_disk_that_is_full_indeed(experts: list[Path], tmp_path: Path, small_disk: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    whole = training(elsewhere, experts[:2])
    assert whole.run()[0] == 0
    command = training(small_disk, experts[:2])
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - 100_000))
    code, said = command.run()
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "No space left" in said
    command.require_whole()
    (small_disk / "filler").unlink()
    assert command.run()[0] == 0
    name = "aggregators.safetensors"
    assert command.result()[name] == whole.result()[name]


@pytest.mark.slow
@pytest.mark.fault(
    "read-only output",
    "train, distill, generate, merge, evaluate, prune",
    how="the output folder is not writable",
    holds="exit code 2 and one line; nothing is written",
)
@pytest.mark.parametrize("name", MAKERS)
def test_an_output_that_may_not_be_written(name: str, experts: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    command = made(name, root, experts)
    before = sorted(root.rglob("*"))
    root.chmod(0o555)
    try:
        code, _, said = warm.run(command.arguments, like_anyone=True)
    finally:
        root.chmod(0o755)
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert "Permission denied" in said
    assert sorted(root.rglob("*")) == before
