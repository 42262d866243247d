"""Ask for advisories on everything that is pinned.

    python -m tools.audit                  # the package index's
    python -m tools.audit --service osv    # those of osv.dev

Ends with 0 if every pin was asked for and none has an advisory, with 1 if one has, and with 2 if
the service did not answer for all.
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
    "So it is not known whether there are advisories. Run it where the service answers, or ask the "
    "other one: make audit SERVICE=pypi or SERVICE=osv"
)


def advisories(report: dict[str, Any], pins: Pins, file: str) -> list[str]:
    """The advisories of a report of pip-audit, a line each.

    Raises:
        AfaError: the service did not answer for every pin.
    """
    wanted = {name for name, pin in pins.items() if not pin.marker or Marker(pin.marker).evaluate()}
    asked = {canonicalize_name(each["name"]): each for each in report["dependencies"]}
    answered = {name for name in asked if "skip_reason" not in asked[name]}
    if missing := sorted(wanted - answered):
        why = asked.get(missing[0], {}).get("skip_reason", "it was not asked for")
        raise AfaError(
            "AFA-TOOL-001",
            f"The advisory service must answer for every pin of {file}, and answered for "
            f"{len(wanted & answered)} of {len(wanted)}; of {missing[0]}: {why}. {_REMEDY}",
        )
    return [
        f"{name} {asked[name]['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for name in sorted(answered)
        for found in asked[name]["vulns"]
    ]


def ask(lock: Path, service: str) -> dict[str, Any]:
    """What pip-audit reports on a lock.

    Raises:
        AfaError: it ends without a report, since the service cannot be reached for example.
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
            f"The advisory service must answer, and pip-audit says of {lock.name}: {said} "
            f"{_REMEDY}",
        ) from None


def main() -> int:
    """Ask for all locks."""
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
    say(f"{len(found)} advisories on {number} pins.")
    return int(bool(found))


if __name__ == "__main__":
    run(main)
