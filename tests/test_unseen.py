"""The tables about unseen objects follow from the outcomes of single pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from afa.zoo.scenes import parse_caption
from afa.zoo.sprites import DOMAIN_OF, DOMAINS
from benchmarks.unseen_outcomes import (
    DEFAULT,
    DRAFTS,
    KEPT,
    OF_KNOWN,
    OWN_EXPERT,
    Outcomes,
    write_page,
)
from benchmarks.unseen_prompts import BOTH, GROUPS, ONE, OWN_SEEN, OWN_UNSEEN, SEEN, prompts_of


def content(choice: int, zoo: str = "small") -> dict[str, Any]:
    """Aggregators are right where all objects are seen, each expert on its own domain."""
    prompts = [[text, group] for group, each in prompts_of(choice, 8).items() for text in each]
    of_aggregators = "".join("1" if group in (SEEN, OWN_SEEN) else "0" for _, group in prompts)
    experts = {
        f"expert: {domain}": "".join(
            "1" if DOMAIN_OF[parse_caption(text).left] == domain else "0" for text, _ in prompts
        )
        for domain in DOMAINS
    }
    ones, zeros = "1" * len(prompts), "0" * len(prompts)
    return {
        "zoo": zoo,
        "choice": choice,
        "trainings": ["AFA", "prompts alone"],
        "trained_on_scenes": ["AFA"],
        "prompts": prompts,
        "rows": {
            "AFA": {"both": [of_aggregators, zeros], "calls": 60.0},
            "prompts alone": {"both": [ones, ones], "calls": 60.0},
            f"AFA{KEPT}": {"both": [of_aggregators, ones], "calls": 150.0},
            DRAFTS: {"both": [ones], "calls": 150.0},
            "base": {"both": [zeros], "calls": 20.0},
            **{name: {"both": [bits], "calls": 20.0} for name, bits in experts.items()},
            "oracle mask": {"both": [ones], "calls": None},
        },
    }


def test_rows_of_several_choices_and_trainings() -> None:
    outcomes = Outcomes([content(0), content(1)])
    means = {
        name: [None if each is None else each.mean for each in found]
        for name in outcomes.names
        for found in [[outcomes.mean(name, group) for group in GROUPS]]
    }
    assert [*means] == [
        *("AFA", f"AFA{DEFAULT}", f"AFA{OF_KNOWN}", "prompts alone", f"AFA{KEPT}", DRAFTS),
        *("base", "oracle mask", OWN_EXPERT),
    ]
    assert means["AFA"] == [0.5, 0, 0, 0.5, 0], "the mean of two trainings"
    assert means[f"AFA{DEFAULT}"] == [0.5, 1, 1, 0.5, 1], "drafts draw unknown words"
    assert means[f"AFA{KEPT}"] == [1, 0.5, 0.5, 1, 0.5]
    assert means[f"AFA{OF_KNOWN}"] == [1, 1, 1, 1, 1], "drafts alone where objects are unseen"
    assert means[OWN_EXPERT] == [None, None, None, 1, 1]
    scores = outcomes.scores("AFA", ONE)
    assert scores is not None
    assert scores.shape == (2, 16), "the prompts of both choices"
    difference = outcomes.difference("AFA", OWN_EXPERT, OWN_SEEN)
    assert difference is not None
    assert difference.mean == -0.5
    assert outcomes.difference("AFA", OWN_EXPERT, BOTH) is None
    found = np.array([outcomes.mean("base", group) is not None for group in GROUPS])
    assert found.all()


def test_the_page_has_a_table_for_each_zoo(tmp_path: Path) -> None:
    (tmp_path / "unseen").mkdir()
    for choice in (0, 1):
        path = tmp_path / "unseen" / f"small-{choice}.json"
        path.write_text(json.dumps(content(choice)))
    page = tmp_path / "drafts.md"
    page.write_text("before\n<!-- begin small -->\nold\n<!-- end small -->\nafter\n")
    write_page(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- begin small -->\n\n| row |")
    assert text.endswith("<!-- end small -->\nafter\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if line.startswith(f"| AFA{DEFAULT} | 0.50"))
    assert line.endswith("| 60 or 150 | 4 |"), "two choices with two trainings each"
    line = next(line for line in text.splitlines() if line.startswith("| prompts alone | 1.00"))
    assert line.endswith("| 60 | 2 |"), "the same trainings for both choices"
    against = [line for line in text.splitlines() if line.startswith("| AFA | ")][1]
    assert against.count("|") == 6
    assert "-0.50" in against.split("|")[4]
    assert OWN_UNSEEN in text
    write_page(tmp_path)
    assert page.read_text() == text
