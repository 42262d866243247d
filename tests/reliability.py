"""The table of docs/reliability.md, made from the tests that provoke faults as they run.

A test says what it is about: `@pytest.mark.fault("kill -9", "a training", how="...", holds="...")`.
With `--reliability FILE` what came of each is written there as JSON, and the page beside it gets
its table anew. See `make reliability`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tools.parts import write_part

_PROPERTY = "fault"


class Reliability:
    """Collects what came of the marked tests, from all processes of a run."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        fault = dict(report.user_properties).get(_PROPERTY)
        if not isinstance(fault, str):
            return
        name = report.nodeid.split("[")[0]
        entry = self._found.setdefault(
            name, {**json.loads(fault), "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
        )
        entry["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            entry[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        commit = _git("rev-parse", "--short", "HEAD")
        found = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit + ("+" if _git("status", "--porcelain", "--", "src", "tests") else ""),
            "faults": [{"test": name, **entry} for name, entry in sorted(self._found.items())],
        }
        self._place.write_text(json.dumps(found, indent=1) + "\n")
        write_part(self._place.with_suffix(".md"), "faults", table(found))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def note_fault(item: pytest.Item) -> None:
    """Have a marked test's report carry what it is about."""
    mark = item.get_closest_marker("fault")
    if mark is not None:
        fault, what = mark.args
        told = {"fault": fault, "what": what, **mark.kwargs}
        item.user_properties.append((_PROPERTY, json.dumps(told)))


def table(found: dict[str, Any]) -> str:
    """What was found, in Markdown."""
    rows = [
        f"Last run: {found['date']}, at commit `{found['commit']}`.",
        "",
        "| Fault | in | how it is provoked | what must hold | test | last result |",
        "|---|---|---|---|---|---|",
    ]
    for entry in sorted(found["faults"], key=lambda entry: (entry["fault"], entry["what"])):
        name = entry["test"].split("::")[-1]
        file = entry["test"].split("::")[0]
        rows.append(
            f"| {entry['fault']} | {entry['what']} | {entry['how']} | {entry['holds']} | "
            f"`{file}`: `{name}` | {_result(entry)} |"
        )
    return "\n".join(rows)


def _result(entry: dict[str, Any]) -> str:
    counts = [f"{entry[key]} {key}" for key in ("passed", "failed", "skipped") if entry[key]]
    return f"{', '.join(counts)} in {entry['seconds']:.0f} s"


def faults_in(items: Sequence[pytest.Item]) -> list[str]:
    """The names of all marked tests, without parameters."""
    marked = (item for item in items if item.get_closest_marker("fault") is not None)
    return sorted({item.nodeid.split("[")[0] for item in marked})
