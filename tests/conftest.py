"""Fixtures shared by all tests: tiny experts on disk, one thread's worth of determinism."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from afa.cli.console import quieten

quieten()  # before the libraries read their settings
os.environ["HF_HUB_OFFLINE"] = "1"
_datasets = tempfile.TemporaryDirectory(prefix="afa-tests-")
os.environ["HF_DATASETS_CACHE"] = _datasets.name

from tests.tiny import tiny_pipeline  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
