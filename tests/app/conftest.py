"""Pages that are served by processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Start `afa app` with options; gives the page's address. All end with the module."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.app.serve", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            found = re.search(r"afa is at (http://\S+)", line)
            if found:
                return found[1].rstrip("/")
        raise AssertionError("".join(said))

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            said, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "gradio.exceptions" not in said, said  # what a browser shows for a moment only


@pytest.fixture(scope="module")
def address(serve: Callable[..., str]) -> str:
    """The page of the shipped ensemble."""
    return serve()
