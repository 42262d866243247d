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


@pytest.mark.fault(
    "no network",
    "train, merge, evaluate, inspect",
    how="hub ids, with and without --offline",
    holds="with --offline, no host name is looked up; one line in both cases, and no endless "
    "waiting",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train data", "merge", "evaluate", "inspect"])
def test_nobody_is_asked(
    name: str, watched: dict[str, str], experts: list[Path], tmp_path: Path
) -> None:
    arguments = command(name, tmp_path, experts)
    said = []
    for options in (["--offline"], []):
        (tmp_path / "asked").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "afa", *arguments, *options],
            env=watched,
            capture_output=True,
            text=True,
            timeout=300,  # a hang fails the test
        )
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, done.stderr
        assert len(lines) == 1, done.stderr
        said.append((lines[0], (tmp_path / "asked").exists()))
    (offline, asked_offline), (_, asked_online) = said
    assert not asked_offline
    assert "ffline" in offline
    assert asked_online  # or the watch would see nothing
