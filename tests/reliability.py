"""The table of injected faults in docs/reliability.md, written from test results.

A test describes its fault: `@pytest.mark.fault("kill -9", "train", how="...", holds="...")`. With
`--reliability=FILE` the results are written to FILE as JSON, and the table of the page beside it is
updated. Tests that did not run keep their last result. See `make reliability`.
"""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tools.parts import write_part

_PROPERTY = "fault"


class Reliability:
    """Collects the results of the marked tests, from all processes of a run."""

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
        changed = "+" if _git("status", "--porcelain", "--", "src", "tests") else ""
        when = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": _git("rev-parse", "--short", "HEAD") + changed,
        }
        # those that did not run this time keep their last result
        before = json.loads(self._place.read_text()) if self._place.exists() else []
        entries = {entry["test"]: entry for entry in before}
        entries |= {name: {"test": name, **entry, **when} for name, entry in self._found.items()}
        known = faults_in(Path(__file__).parent)
        found = sorted(
            (entry for name, entry in entries.items() if name in known),
            key=lambda entry: (entry["fault"], entry["what"], entry["test"]),
        )
        self._place.write_text(json.dumps(found, indent=1) + "\n")
        page = self._place.with_suffix(".md")
        if page.exists():
            write_part(page, "faults", table(found))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def note_fault(item: pytest.Item) -> None:
    """Attach the description of a marked test's fault to its report."""
    mark = item.get_closest_marker("fault")
    if mark is not None:
        fault, what = mark.args
        told = {"fault": fault, "what": what, **mark.kwargs}
        item.user_properties.append((_PROPERTY, json.dumps(told)))


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    rows = [
        "| fault | commands | how it is injected | required behaviour | test | last result |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found:
        name = entry["test"].split("::")[-1]
        file = entry["test"].split("::")[0]
        rows.append(
            f"| {entry['fault']} | {entry['what']} | {entry['how']} | {entry['holds']} | "
            f"`{file}`: `{name}` | {_result(entry)} |"
        )
    return "\n".join(rows)


def _result(entry: Mapping[str, Any]) -> str:
    counts = [f"{entry[key]} {key}" for key in ("passed", "failed", "skipped") if entry[key]]
    return f"{', '.join(counts)}, {entry['date']}, `{entry['commit']}`"


def faults_in(tests: Path) -> set[str]:
    """List all marked tests of a folder as `FILE::NAME`, without running them."""
    found = set()
    for file in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            if any(mark.startswith("pytest.mark.fault(") for mark in marks):
                place = file.relative_to(tests.parent).as_posix()
                found.add(f"{place}::{getattr(node, 'name', '')}")
    return found
