"""Codes of errors: every error has one of its own, and none is ever used again."""

from __future__ import annotations

import ast
import pickle
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from afa.errors import AfaError
from tests.refusal import refusal

ROOT = Path(__file__).parents[1]
#: every code that there ever was, one a line; "retired" behind those that are no longer raised
KNOWN = Path(__file__).with_name("error_codes.txt")
#: what takes a code first
RAISED = ("AfaError", "Ambiguous", "BrokenPicture", "MissingCaption", "NotFinite", "Finding")


@cache
def codes() -> Counter[str]:
    """Every code in the source, with how often it is there."""
    found: Counter[str] = Counter()
    for folder in ("src", "tools", "integrations"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                place = {"say_error": 1, **dict.fromkeys(RAISED, 0)}.get(name)
                if place is None or len(node.args) <= place:
                    continue
                code = node.args[place]
                if isinstance(code, ast.Constant):
                    found[str(code.value)] += 1
                else:  # of another error, which is passed on
                    assert ast.unparse(code).endswith(".code"), f"{file.name}: {ast.unparse(node)}"
    return found


def test_every_error_has_a_code_of_its_own() -> None:
    found = codes()
    assert len(found) > 400
    assert [code for code in found if not re.fullmatch(r"AFA-[A-Z]+-\d{3}", code)] == []
    assert [code for code, count in found.items() if count > 1] == []


def test_no_code_is_used_again() -> None:
    """A new error adds a line to the list; an error that goes is marked as retired there."""
    lines = [line.split() for line in KNOWN.read_text().splitlines()]
    known = {code for code, *_ in lines}
    retired = {code for code, *also in lines if also == ["retired"]}
    assert len(known) == len(lines)
    assert set(codes()) == known - retired


def test_pages_name_codes_that_there_are() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]:
        named = set(re.findall(r"AFA-[A-Z]+-\d{3}", page.read_text()))
        assert named <= set(codes()), page.name


def test_an_error_has_its_code_everywhere() -> None:
    error = AfaError("AFA-LOAD-017", "one\ntwo")
    assert (error.code, str(error)) == ("AFA-LOAD-017", "one two")
    again = pickle.loads(pickle.dumps(error))  # from a worker process
    assert (type(again), again.code, str(again)) == (AfaError, error.code, str(error))
    with pytest.raises(AfaError, match="AFA-LOAD-017"):  # in a traceback, too
        raise error


def test_a_refusal_is_told_by_its_code_and_its_values() -> None:
    def fail() -> None:
        raise AfaError("AFA-LOAD-017", "'a.bin' has 3 tensors.")

    with refusal("AFA-LOAD-017", "'a.bin'", "3") as caught:
        fail()
    assert caught.value.code == "AFA-LOAD-017"
    with pytest.raises(AssertionError, match=r"AFA-LOAD-017: .*a\.bin"), refusal("AFA-X-001"):
        fail()
    with pytest.raises(AssertionError, match="no '4' in"), refusal("AFA-LOAD-017", "4"):
        fail()
    with pytest.raises(pytest.fail.Exception), refusal("AFA-LOAD-017"):
        pass
