"""--offline: no command asks the hub for anything, and none waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.test_cli import AGGREGATOR

pytestmark = pytest.mark.processes

COMMANDS = ("train", "train data", "merge", "evaluate", "inspect")

#: imported first by every Python there: notes who asks for an address, and lets nobody have one
_WATCH = """
import os, socket, sys

def refused(host, *args, **kwargs):
    with open(os.environ["AFA_ASKED"], "a") as file:
        file.write(f"{host}\\n")
    raise socket.gaierror(socket.EAI_NONAME, "nothing is known by that name")

socket.getaddrinfo = refused
"""


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(_WATCH)
    kept = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "watch"), *sys.path]),
        "AFA_ASKED": str(tmp_path / "asked"),
        "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1",
    }


def command(name: str, folder: Path, experts: list[Path]) -> list[str]:
    recipe = {
        "train": {
            "experts": [str(experts[0]), "org/model"],
            "data": {"scenes": {"num_samples": 4}},
            "aggregator": AGGREGATOR,
            "training": {"num_steps": 1, "device": "cpu"},
        },
        "train data": {
            "experts": [str(expert) for expert in experts],
            "data": {"dataset": {"path": "org/rows"}},
            "aggregator": AGGREGATOR,
            "training": {"num_steps": 1, "device": "cpu"},
        },
        "merge": {"method": "weighted", "experts": [str(experts[0]), "org/model"]},
        "evaluate": {
            "prompts": {"zoo": {"kinds": {"mixed": 1}}},
            "methods": [{"name": "a", "model": str(experts[0])}],
            "sampling": {"num_steps": 1, "device": "cpu"},
            "metrics": [{"name": "clip_t", "weights": "org/clip"}],
        },
    }.get(name)
    if recipe is None:
        return [name, "org/model"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [name.split()[0], str(folder / "recipe.yaml"), "--output", str(folder / "output")]


def ends_with_one_line(arguments: list[str], watched: dict[str, str]) -> str:
    """Run a command that fails, and return the only line that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "afa", *arguments],
        env=watched,
        capture_output=True,
        text=True,
        timeout=300,  # a hang fails the test
    )
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    return lines[0]


@pytest.mark.fault(
    "no network",
    "train, merge, evaluate, inspect",
    how="hub ids, with --offline",
    holds="no host name is looked up; exit code 2 and one line",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("inspect", "train data") else pytest.mark.nightly)
        for name in COMMANDS
    ],
)
def test_offline_no_host_is_looked_up(
    name: str, watched: dict[str, str], experts: list[Path], tmp_path: Path
) -> None:
    line = ends_with_one_line([*command(name, tmp_path, experts), "--offline"], watched)
    assert not Path(watched["AFA_ASKED"]).exists()
    assert "ffline" in line


@pytest.mark.fault(
    "no network",
    "train, merge, evaluate, inspect",
    how="hub ids, without --offline",
    holds="exit code 2 and one line after the hub library's retries; no endless waiting",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # the library tries again for up to a minute; one command shows that the watch sees it
    [
        pytest.param(name, marks=pytest.mark.nightly if name != "inspect" else ())
        for name in COMMANDS
    ],
)
def test_online_without_a_network_it_ends(
    name: str, watched: dict[str, str], experts: list[Path], tmp_path: Path
) -> None:
    ends_with_one_line(command(name, tmp_path, experts), watched)
    assert Path(watched["AFA_ASKED"]).exists()
