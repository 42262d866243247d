"""The page of licences has all that is installed and shipped, and what is not known stops it."""

from __future__ import annotations

import re
from email.message import Message
from fnmatch import fnmatch
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

from tests.refusal import refusal
from tools import ROOT
from tools.assets import ASSETS
from tools.licences import ALLOWED, PAGE, check, licence_of
from tools.pins import EXTRAS_LOCK, LOCK, read_pins

ROWS = re.findall(r"^\| ([\w.-]+) \| ([\w.-]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


class Given(Distribution):
    """A distribution that is its metadata."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        self.fields = Message()
        for key, value in (("Name", "Some_thing"), ("Version", "1.0"), *fields):
            self.fields[key] = value

    def read_text(self, filename: str) -> str | None:
        return str(self.fields) if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(path)


CLASSIFIER = "License :: OSI Approved :: "


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT OR Zlib"), ("License", "BSD")], "MIT OR Zlib"),
        ([("Classifier", f"{CLASSIFIER}MIT License"), ("License", "see file")], "MIT"),
        ([("Classifier", f"{CLASSIFIER}BSD License"), ("License", "BSD-3-Clause")], "BSD-3-Clause"),
        ([("Classifier", f"{CLASSIFIER}BSD License"), ("License", "New BSD")], "BSD"),
        (
            [("Classifier", f"{CLASSIFIER}{name}") for name in ("MIT License", "BSD License")],
            "BSD AND MIT",
        ),
        ([("License", "Apache 2.0 License")], "Apache-2.0"),
    ],
)
def test_the_licence_is_read_from_the_metadata(fields: list[tuple[str, str]], licence: str) -> None:
    assert licence_of(Given(*fields)) == licence
    assert check("something", licence) == licence


@pytest.mark.parametrize("fields", [[], [("License", "All rights\n reserved")]])
def test_a_licence_that_is_not_known_is_an_error(fields: list[tuple[str, str]]) -> None:
    with refusal("AFA-TOOL-005", r"1\.0"):
        licence_of(Given(*fields))


@pytest.mark.parametrize(
    "licence", ["GPL-3.0-only", "MIT AND LGPL-2.1-or-later", "Proprietary", f"{CLASSIFIER}Other"]
)
def test_a_licence_that_is_not_allowed_is_an_error(licence: str) -> None:
    with refusal("AFA-TOOL-006"):
        check("something", licence)


def test_the_page_has_every_distribution_that_is_locked() -> None:
    pins = read_pins(LOCK) | read_pins(EXTRAS_LOCK)
    assert {name: version for name, version, _ in ROWS if name in pins} == {
        name: pin.version for name, pin in pins.items()
    }, "docs/licences.md is not of these pins: make licences"
    assert {name for name, version, _ in ROWS} - {"distribution", "path", "---"} == set(pins)
    for name, _, licence in ROWS:
        if name in pins:
            check(name, licence)
    assert "MIT" in ALLOWED


def test_everything_that_ships_has_a_row() -> None:
    shipped = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "src" / "afa").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "py.typed"
    ]
    assert len(shipped) > 40
    page = PAGE.read_text()
    unused = {row.path for row in ASSETS}
    for path in shipped:
        rows = [row for row in ASSETS if fnmatch(path, row.path) or path.startswith(f"{row.path}/")]
        assert rows, path
        unused -= {row.path for row in rows}
    assert not unused
    notice = (ROOT / "NOTICE").read_text()
    for row in ASSETS:
        assert f"| `{row.path}` | {row.what} | {row.who} | {row.licence} | {row.text} |" in page
        assert "NOTICE" not in row.text or row.path.rsplit("/", 1)[1] in notice
