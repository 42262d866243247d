"""The golden record: what every scenario gave when it was written, and on which machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.golden.digests import Digest, machine

FILE = Path(__file__).parent / "record.json"


@dataclass(frozen=True)
class Record:
    """What was found, by scenario and result.

    Attributes:
        machine: where.
        found: a digest of each result.
    """

    machine: str
    found: Mapping[str, Mapping[str, Digest]]


def recorded() -> Record:
    """The record as it is committed."""
    told = json.loads(FILE.read_text(encoding="utf-8"))
    found = {
        scenario: {
            name: Digest(sha, tuple(numbers), near) for name, (sha, numbers, near) in each.items()
        }
        for scenario, each in told["found"].items()
    }
    return Record(told["machine"], found)


def write(found: Mapping[str, Mapping[str, Digest]]) -> None:
    """Write the record of this machine."""
    lines = [
        f" {json.dumps(scenario)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(d.as_json())}" for name, d in each.items())
        + "\n }"
        for scenario, each in found.items()
    ]
    text = f'{{"machine": {json.dumps(machine())},\n"found": {{\n' + ",\n".join(lines) + "\n}}\n"
    FILE.write_text(text, encoding="utf-8")


def differences(scenario: str, found: Mapping[str, Digest], record: Record) -> list[str]:
    """What is not as it was, a line each; bits count on the machine of the record alone."""
    before, to_the_bit = record.found[scenario], record.machine == machine()
    lines = [f"{scenario}: {name} is missing" for name in before.keys() - found.keys()]
    for name, digest in found.items():
        if name not in before:
            lines.append(f"{scenario}: {name} is new")
        elif not digest.equals(before[name], to_the_bit=to_the_bit):
            lines.append(f"{scenario}: {name} was {before[name]}, is {digest}")
    return sorted(lines)
