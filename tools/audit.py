"""Look up security advisories for every pinned distribution.

    python -m tools.audit                  # advisories of the package index
    python -m tools.audit --service osv    # advisories of osv.dev

The exit code is 0 if every pin was checked and none has an advisory, 1 if one has, and 2 if the
service did not answer for every pin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from afa.errors import AfaError
from tools import ROOT, run, say
from tools.pins import EXTRAS_LOCK, LOCK, TOOLS_LOCK, Pins, read_pins

if TYPE_CHECKING:
    from pathlib import Path

_REMEDY = (
    "The pins are therefore not fully checked. Run the command where the service can be reached, "
    "or use the other service: make audit SERVICE=pypi or SERVICE=osv"
)


def advisories(report: dict[str, Any], pins: Pins, file: str) -> list[str]:
    """List the advisories in a report of pip-audit, one line each.

    Raises:
        AfaError: if the service did not answer for every pin.
    """
    wanted = {name for name, pin in pins.items() if not pin.marker or Marker(pin.marker).evaluate()}
    asked = {canonicalize_name(each["name"]): each for each in report["dependencies"]}
    answered = {name for name in asked if "skip_reason" not in asked[name]}
    if missing := sorted(wanted - answered):
        why = asked.get(missing[0], {}).get("skip_reason", "it is not in the report")
        raise AfaError(
            "AFA-TOOL-001",
            f"The advisory service answered for {len(wanted & answered)} of {len(wanted)} pins of "
            f"{file}; {missing[0]}: {why}. {_REMEDY}",
        )
    return [
        f"{name} {asked[name]['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for name in sorted(answered)
        for found in asked[name]["vulns"]
    ]


def ask(lock: Path, service: str) -> dict[str, Any]:
    """Run pip-audit on a lock file and return its report.

    Raises:
        AfaError: if it ends without a report, for example because the service cannot be reached.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip"]
    command += ["--require-hashes", "--vulnerability-service", service, "--format", "json"]
    command += ["--progress-spinner", "off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise AfaError(
            "AFA-TOOL-002",
            f"pip-audit wrote no report for {lock.name}: {said.rstrip('.')}. {_REMEDY}",
        ) from None


def main() -> int:
    """Check all lock files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi")
    service = parser.parse_args().service
    found, number = [], 0
    for lock in (LOCK, EXTRAS_LOCK, TOOLS_LOCK):
        pins = read_pins(lock)
        number += len(pins)
        found += advisories(ask(lock, service), pins, str(lock.relative_to(ROOT)))
    for line in found:
        say(line)
    say(f"{len(found)} advisories for {number} pins.")
    return int(bool(found))


if __name__ == "__main__":
    run(main)
