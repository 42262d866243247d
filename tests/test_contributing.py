"""What CONTRIBUTING.md says of the code: one prompt's way, followed through a real command."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from afa.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "afa"


def the_way() -> list[tuple[str, str]]:
    """Files and functions, as they are listed."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\d\. `src/afa/([\w/]+\.py)`, `([\w.]+)`", text, re.MULTILINE)


def calls_of(arguments: list[str]) -> list[tuple[str, str]]:
    """All calls of functions of the package, as file and function, in their order."""
    seen: list[tuple[str, str]] = []
    root = str(PACKAGE)

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            file = Path(code.co_filename).relative_to(root).as_posix()
            seen.append((file, code.co_qualname))

    sys.setprofile(note)
    try:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    finally:
        sys.setprofile(None)
    assert not stop.value.code
    return seen


@pytest.mark.slow
def test_one_prompt_goes_this_way(tmp_path: Path) -> None:
    way = the_way()
    assert 6 <= len(way) <= 9
    arguments = ["generate", "zoo:ensemble", "a fox", "--output", str(tmp_path / "out")]
    calls = iter(calls_of([*arguments, "--steps", "1", "--no-check"]))
    for step in way:  # one after the other; others come between
        assert step in calls, step


def test_every_package_is_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| package |") : text.index("One prompt's way")]
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    missing = {name for name in packages | modules if f"`{name}`" not in table}
    assert not missing
    assert len(modules) + 2 <= 10
