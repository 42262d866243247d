"""What the page says against itself: its limits, and scores that contradict the first one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afa.studies.results.conclusions import conclusions, own_domain_means
from afa.studies.results.limits import budget, edges, limits, limits_of_transformers
from afa.studies.results.page import page
from afa.studies.results.plan import SUBJECT, TIME, VARIANTS
from afa.studies.zoo_build.workshop import ModelsRecipe
from tests.studies.results.test_study import figures

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def committed() -> dict[str, Any]:
    return json.loads((DOCS / "results.json").read_text())


def with_cmmd(means: dict[str, list[float]], **others: float) -> dict[str, Any]:
    """Results in which some rows have a CMMD, by seed of training."""
    _, results = figures(others, tuned=0.5)
    for row in results["rows"]:
        seeds = means.get(row["method"])
        if seeds is not None:
            row["cmmd"] = {"mean": sum(seeds) / len(seeds), "by_replica": seeds}
    return results


def test_a_score_that_contradicts_comes_first() -> None:
    results = with_cmmd({SUBJECT: [0.08, 0.1], TIME: [0.03, 0.05], "expert: food": [0.2]})
    first = conclusions(results)[0]
    assert f"{SUBJECT} has a CMMD of 0.09 (seeds 0.08 to 0.1)" in first
    assert first.endswith(f"**Lower are:** {TIME} 0.04 (seeds 0.03 to 0.05).")


def test_a_score_that_agrees_is_said_to() -> None:
    first = conclusions(with_cmmd({SUBJECT: [0.05], TIME: [0.06]}))[0]
    assert f"{SUBJECT} has a CMMD of 0.05" in first
    assert first.endswith("no row is lower.")


def test_a_domain_where_the_expert_is_better_comes_before_the_others() -> None:
    _, results = figures({"expert: things": 0.99}, tuned=0.5)
    domains = [line for line in conclusions(results) if line.startswith("On prompts of ")]
    assert "things only" in domains[0]
    assert "**below**" in domains[0]
    assert len(domains) == 3


def test_what_counts_against_a_speed_is_said() -> None:
    results = with_cmmd({SUBJECT: [0.05], "AFA, fast": [0.07]}, **{"AFA, fast": 0.87})
    assert "It has a worse CMMD (0.07, exact 0.05)." in " ".join(conclusions(results))


def test_an_ablation_of_another_size_is_no_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the only aggregator decides, so the sentence says so until both are equal."""
    _, results = figures({}, tuned=0.5)
    name = "ablation: conv_out only"
    (line,) = [line for line in conclusions(results) if line.startswith(name)]
    assert "too small for conclusions on fusing predictions only" in line
    full = {**VARIANTS[name], "hidden_ratio": None, "min_scale": 1}
    monkeypatch.setitem(VARIANTS, name, full)
    (line,) = [line for line in conclusions(results) if line.startswith(name)]
    assert "too small" not in line


def test_the_budget_counts_the_experts() -> None:
    results = {
        "settings": {"batch_size": 4, "num_train_steps": 10},
        "training": {TIME: {"num_steps": 25}},
    }
    text = budget(results, ModelsRecipe(expert_steps=100, batch_size=8))
    assert "25 steps of 4 (100 scenes)" in text
    assert "aggregators' 40 scenes" in text
    assert "fine-tuned on 2,400 scenes" in text


def test_settings_at_the_edge_are_named() -> None:
    merge = {"method": "ties", "density": 0.5, "weights": [1.0] * 3}
    results: dict[str, Any] = {
        "settings": {"base_learning_rates": [1e-4, 1e-3, 1e-2]},
        "chosen": {
            "TIES merge": {"merge": merge},
            "MagicFusion": {"fusion": {"rule": "magic_fusion", "temperatures": [100.0]}},
            "timestep hand-over": {"fusion": {"rule": "hand_over", "order": [0, 1, 2]}},
            "weighted merge": {"merge": {"method": "weighted", "weights": [0.5, 0.25, 0.25]}},
            "tuned base": {"learning_rate": 1e-3},
        },
    }
    (text,) = edges(results)
    assert text.endswith(": TIES merge: weights 1, the largest of 3.")
    merge["weights"] = [0.5] * 3
    assert edges(results) == []
    results["chosen"]["tuned base"] = {"learning_rate": 1e-2}
    (text,) = edges(results)
    assert text.endswith(": tuned base: learning rate 0.01, the largest of 3.")


def test_the_committed_run_is_limited_where_it_is(committed: dict[str, Any]) -> None:
    text = " ".join(limits(committed))
    assert "1,200 steps of 16 (19,200 scenes)" in text
    assert "fine-tuned on 192,000 scenes" in text
    assert "add-difference merge: weights 0.05, the smallest of 6" in text
    assert "is -0.25 for AFA" in text
    transformers = json.loads((DOCS / "results-dit.json").read_text())
    assert "fine-tuned on 96,000 scenes" in " ".join(limits_of_transformers(transformers))


def test_limits_stand_before_any_result(committed: dict[str, Any]) -> None:
    text = page(committed)
    places = [text.index(part) for part in ("## Limits", "## Summary", "above all of")]
    assert places == sorted(places)
    assert "cannot be reproduced from it" in text
    assert "Its result is open" in text


def test_means_over_domains(committed: dict[str, Any]) -> None:
    means = own_domain_means(committed)
    assert means[SUBJECT] == pytest.approx(0.88, abs=0.005)
    assert means["ablation: no spatial"] > means[SUBJECT]
