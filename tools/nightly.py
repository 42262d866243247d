"""Run the long tests, which `make check` skips, and record their result.

    make nightly

The result is written to docs/nightly.json and, as one line, to docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from afa.provenance import commit
from tools.parts import write_part

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "nightly.json"
PAGE = ROOT / "docs" / "reliability.md"
#: the options that the Makefile uses for the other tests
_PYTEST = ("-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "load")


def main() -> int:
    """Run the tests and return the exit status of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, *_PYTEST, "-m", "nightly and not gpu", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if report.is_file():
            record = read(report)
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            write_part(PAGE, "nightly", line(record))
    return done.returncode


def read(report: Path) -> dict[str, Any]:
    """Read the counts from pytest's JUnit report, and add the date and the commit."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest writes one"
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "passed": passed,
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
        "minutes": round(float(suite.attrib["time"]) / 60, 1),
    }


def recorded() -> dict[str, Any] | None:
    """Return the record of the last run, or None before the first run."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None


def line(record: Mapping[str, Any] | None) -> str:
    """Format the record as one sentence."""
    if record is None:
        return "`make nightly` has not been run yet."
    return (
        f"Last run of `make nightly`: {record['date']}, commit {record['commit']}: "
        f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped, in "
        f"{record['minutes']} minutes."
    )


if __name__ == "__main__":
    sys.exit(main())
