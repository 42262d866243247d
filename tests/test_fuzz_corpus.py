"""Whatever the fuzzer has kept or found goes through the readers as it should, without a fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.run import CORPUS, FINDINGS
from fuzz.targets import TARGETS, feed


def inputs(target: str) -> list[Path]:
    folders = [CORPUS / target, FINDINGS / target]
    return [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]


@pytest.mark.fault(
    "inputs from the fuzzer",
    "all readers",
    how="the corpus and every finding of earlier runs",
    holds="each input is accepted, or refused in one line",
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFA_FOLDERS", raising=False)
    found = inputs(target)
    assert found, "there is a corpus"
    accepted = [feed(target, file.read_bytes()) for file in found]
    assert any(accepted)
    assert target in ("bias", "captions") or not all(accepted)
