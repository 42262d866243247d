"""What jobs of the tests do: in a module that processes of their own import at once."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from afa.errors import AfaError
from afa.studies import jobs


def write_name(name: str, folder: Path) -> None:
    (folder / name).write_text(name)


def fail(name: str, folder: Path) -> None:
    raise AfaError("AFA-STUDY-001", "It must not be so.")


def count_forever(name: str, folder: Path) -> None:
    for step in itertools.count():
        (folder / "steps").write_text(str(step))
        (folder / "pid").write_text(str(os.getpid()))
        jobs.report_progress(name, step, 1_000_000)
        time.sleep(0.05)
