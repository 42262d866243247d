"""The tables about experts of several kinds follow from the outcomes of single pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afa.zoo.scenes import caption_of
from benchmarks.mixed_outcomes import (
    EQUAL,
    FAMILIES,
    FILE,
    GROUP,
    MIXED,
    OWN,
    PAGE,
    PREDICTIONS,
    Outcomes,
    write_page,
)

_MIXED = [caption_of("fox", "pizza", "red"), caption_of("cat", "car", "red")]
_OWN = [caption_of("fox", "cat", "blue"), caption_of("pizza", "burger", "blue")]


def _content() -> dict[str, Any]:
    """Aggregators after every block are right twice, of two trainings one; predictions always."""
    row = {"calls": 60.0}
    ensembles = {name: {"both": ["1111", "0000"], **row} for name in (EQUAL, *MIXED)}
    ensembles |= {f"{name}{PREDICTIONS}": {"both": ["1111"] * 2, **row} for name in ensembles}
    return {
        "prompts": [[text, GROUP] for text in _MIXED]
        + [[text, group] for text, group in zip(_OWN, ("animals", "food"), strict=True)],
        "rows": {
            **ensembles,
            FAMILIES: {"both": ["1101"], **row},
            "base": {"both": ["0000"], "calls": 20.0},
            "weighted merge of velocity": {"both": ["0011"], "calls": 20.0},
            "DARE merge of velocity": {"both": ["1000"], "calls": 20.0},
        },
    }


def test_shares_and_differences() -> None:
    outcomes = Outcomes(_content())
    assert outcomes.best_merge == "DARE merge of velocity", "on mixed prompts"
    assert outcomes.mean(EQUAL, GROUP).mean == 0.5, "the mean of two trainings"
    assert [outcomes.mean(FAMILIES, group).mean for group in (GROUP, OWN)] == [1, 0.5]
    assert outcomes.difference(FAMILIES, EQUAL, OWN).mean == 0
    assert outcomes.difference(f"{EQUAL}{PREDICTIONS}", EQUAL, GROUP).mean == 0.5


def test_tables_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(_content()), encoding="utf-8")
    page = tmp_path / PAGE
    page.write_text("before\n<!-- begin kinds -->\nold\n<!-- end kinds -->\nafter\n")
    write_page(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- begin kinds -->\n\n| row |")
    assert text.endswith("<!-- end kinds -->\nafter\n")
    assert "old" not in text
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    for name in (*MIXED, f"{EQUAL}{PREDICTIONS}", FAMILIES):
        assert f"{name} - DARE merge of velocity" in names
    assert [name for name in names if name in (GROUP, OWN)] == []
