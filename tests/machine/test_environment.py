"""Variables are there inside the block alone."""

from __future__ import annotations

import os

import pytest

from afa.machine.environment import changed_environment


def test_what_was_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFA_TEST_SET", "before")
    monkeypatch.delenv("AFA_TEST_NEW", raising=False)
    values = {"AFA_TEST_SET": "inside", "AFA_TEST_NEW": "inside"}
    seen: dict[str, str] = {}

    def fail() -> None:
        seen.update({name: os.environ[name] for name in values})
        raise KeyError

    with pytest.raises(KeyError), changed_environment(values):
        fail()
    assert seen == values
    assert os.environ["AFA_TEST_SET"] == "before"
    assert "AFA_TEST_NEW" not in os.environ
