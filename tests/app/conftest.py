"""Pages that are served by processes of their own."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.warm import Running


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Start `afa app` with options; gives the page's address. All end with the module."""
    processes: list[Running] = []

    def start(*options: str) -> str:
        process = Running(options, module="tests.app.serve")
        processes.append(process)
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            found = re.search(r"afa is at (http://\S+)\s", process.output)
            if found:
                return found[1].rstrip("/")
            time.sleep(0.05)
        raise AssertionError(process.communicate(0))

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "gradio.exceptions" not in "".join(said), said  # what a browser shows for a moment


@pytest.fixture(scope="module")
def address(serve: Callable[..., str]) -> str:
    """The page of the shipped ensemble."""
    return serve()
