"""Advisories are only said to be none where the service was asked and answered for every pin."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.refusal import refusal
from tools import audit, run
from tools.pins import Pin

PINS = {
    pin.name: pin
    for pin in (
        Pin(canonicalize_name("one"), "1.0"),
        Pin(canonicalize_name("two"), "2.0"),
        Pin(canonicalize_name("never"), "1.0", "sys_platform == 'nowhere'"),
    )
}


def _report(**of_two: Any) -> dict[str, Any]:
    one = {"name": "One", "version": "1.0", "vulns": []}
    return {"dependencies": [one, {"name": "two", "version": "2.0", **of_two}]}


def test_no_advisories_are_none_where_all_is_answered() -> None:
    assert audit.advisories(_report(vulns=[]), PINS, "a.lock") == []


def test_advisories_are_told_with_their_remedy() -> None:
    found = [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}]
    assert audit.advisories(_report(vulns=found), PINS, "a.lock") == [
        "two 2.0: PYSEC-1, fixed in 2.1",
        "two 2.0: PYSEC-2, fixed in no version yet",
    ]


def test_a_pin_that_was_passed_over_is_no_pin_without_advisories() -> None:
    with refusal("AFA-TOOL-001", "1", "2"):
        audit.advisories(_report(skip_reason="not found"), PINS, "a.lock")
    with refusal("AFA-TOOL-001", "0", "2"):
        audit.advisories({"dependencies": []}, PINS, "a.lock")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets pip-audit print something, and tells the exit code of the command."""

    def command(output: Any, said: str = "") -> int:
        def printed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            lock = command[command.index("--requirement") + 1]
            return subprocess.CompletedProcess(command, 1, output(lock), said)

        monkeypatch.setattr(audit.subprocess, "run", printed)
        monkeypatch.setattr("sys.argv", ["audit"])
        with pytest.raises(SystemExit) as stop:
            run(audit.main)
        return int(stop.value.code or 0)

    return command


def _all(lock: str, vulns: list[dict[str, Any]]) -> str:
    pins = audit.read_pins(audit.ROOT / lock)
    entries = [{"name": name, "version": pin.version, "vulns": vulns} for name, pin in pins.items()]
    return json.dumps({"dependencies": entries})


def test_the_command_ends_by_what_it_found(
    answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers(lambda lock: _all(lock, [])) == 0
    assert capsys.readouterr().out.startswith("0 advisories for ")
    assert answers(lambda lock: _all(lock, [{"id": "X", "fix_versions": []}])) == 1
    assert "\ntorch 2" in capsys.readouterr().out


def test_a_service_that_cannot_be_reached_is_an_error(
    answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers(lambda _: "", "Traceback\nConnectionError: no route") == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    assert "requirements.lock: ConnectionError: no route." in said.err
