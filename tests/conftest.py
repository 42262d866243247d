"""Fixtures shared by all tests: tiny experts on disk, one thread's worth of determinism."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from afa.machine.quiet import quieten

# Under nohup, SIGHUP is ignored, and would be by all programs that tests start. A handler that does
# nothing protects this process alone: other programs begin with the default.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

quieten()  # before the libraries read their settings
os.environ["HF_HUB_OFFLINE"] = "1"
_datasets = tempfile.TemporaryDirectory(prefix="afa-tests-")
os.environ["HF_DATASETS_CACHE"] = _datasets.name

from tests.reliability import Reliability, note_fault  # noqa: E402
from tests.tiny import tiny_pipeline  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="JSON file for what came of faults.")


def pytest_configure(config: pytest.Config) -> None:
    place = config.getoption("--reliability")
    if place is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reliability(place))


def pytest_runtest_setup(item: pytest.Item) -> None:
    note_fault(item)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pipeline folders of one architecture, with different weights everywhere."""
    root = tmp_path_factory.mktemp("experts")
    folders = []
    for seed in range(3):
        pipeline = tiny_pipeline(root / "tokenizer", seed=seed)
        folders.append(root / f"expert{seed}")
        pipeline.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            root = root.parent  # of all workers: what is kept is made once
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        # recipes of tests name experts that other tests use, too
        patch.setenv("AFA_FOLDERS", str(tmp_path_factory.getbasetemp().parent))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks another machine for anything fails its test."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            pytest.fail(f"a test wanted to talk to {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
