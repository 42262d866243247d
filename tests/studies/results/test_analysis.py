"""What the page of results says follows from the outcomes of single pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa.studies.results.analysis import Outcomes
from afa.studies.results.figures import lines_of_data, lines_of_worlds
from afa.studies.results.page import FEW_STEPS, claims_table, sentences, write_page
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import AFA
from afa.studies.results.settings import WORLDS_OF, StudySettings
from afa.studies.results.summary import summary
from afa.studies.worlds.prompts import prompts_of
from afa.studies.worlds.recipe import WORLDS
from tests.refusal import refusal


def content(**shares: float) -> dict[str, Any]:
    """Outcomes of rows that are right in these shares of the prompts."""
    prompts = [
        [caption, group]
        for group, captions in prompts_of(WORLDS["main"], "development", 120).items()
        for caption in captions
    ]
    rng = np.random.default_rng(0)
    luck = rng.random(len(prompts))  # rows are right for the same prompts
    rows = {
        name: {
            "outcomes": {"both": ["".join("1" if each < share else "0" for each in luck)]},
            "clip_t": [[share] * len(prompts)],
            "expert_calls": 10 * (n + 1),
            "seconds": 0.5,
            "peak_memory": 1_000,
            "seeds": [0],
            "trained": [
                {"steps": 100 * n, "seconds_per_step": 0.2},
                {"steps": None, "seconds_per_step": 0.1},
            ],
            "commit": "0123456789abcdef",
            "machine": ["a processor"],
            "budget": {"base": 1, "experts": n, "own": 5},
            "sets": {
                metric: [{"value": 1 - share, "low": 0.9 - share, "high": 1.1 - share}]
                for metric in ("fid", "kid", "cmmd")
            },
        }
        for n, (name, share) in enumerate(shares.items())
    }
    return {
        "prompts": prompts,
        "mixed": ["mixed"],
        "sampling": {"num_steps": 10, "guidance": 3.0},
        "settings": {"distilled_steps": 2_000, "num_pictures": 100_000, "batch_size": 16},
        "rows": rows,
        "planned": list(rows),
        "real": {"fid": 0.1, "kid": 0.0, "cmmd": 0.01},
        "aggregator_steps": 3_000,
        "chosen": {
            "rivals": {
                "SLERP merge": {"method": {"merge": {}}, "score": 0.2, "edges": []},
                "TIES merge": {"method": {"merge": {}}, "score": 0.3, "edges": ["density"]},
                "MagicFusion": {"method": {"fusion": {}}, "score": 0.9, "edges": []},
            },
            "rates": {"tuned base": {"rate": 1e-3, "is_edge": True}},
            "developed": {"rows": {AFA: {"rate": 1e-3, "is_edge": False, "steps": 3_000}}},
        },
        "divergence": {"animals": 0.3, "food": 0.5},
    }


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes(content(low=0.5, high=0.9, same=0.9, near=0.88), 0.05, 2_000)


def test_groups_and_their_prompts(outcomes: Outcomes) -> None:
    assert outcomes.mixed == ["mixed"]
    assert outcomes.own == ["animals", "food", "things"]
    places = outcomes.places(["mixed"])
    assert len(places) == 120
    clusters = outcomes.clusters(places)
    assert 20 < len(np.unique(clusters)) < 60, "both orders of a pair are one cluster"
    prompts = [["x", "known x known"], ["y", "food"]]
    private = Outcomes({"prompts": prompts, "mixed": ["known x known"], "rows": {}}, 0, 1)
    assert private.mixed == ["known x known"]


def test_verdicts(outcomes: Outcomes) -> None:
    mixed = outcomes.mixed

    def verdict(row: str, other: str, groups: list[str]) -> str:
        return outcomes.compared([row], other, groups)[row].verdict

    assert verdict("high", "low", mixed) == "above"
    assert verdict("low", "high", mixed) == "below"
    # equivalence needs many pairs of objects
    assert verdict("high", "same", outcomes.own) == "equivalent"
    assert verdict("high", "same", mixed) == "not told apart"
    few = Outcomes(content(one=0.9, other=0.9), 0.001, 1_000)
    found = few.compared(["one"], "other", mixed)["one"]
    assert found.verdict == "not told apart", "by so small a margin"
    clustered = outcomes.mean("high", mixed)
    assert clustered.low < clustered.mean < clustered.high
    assert outcomes.mean("high", mixed, "clip_t").mean == pytest.approx(0.9)


def test_the_verdicts_of_a_table_hold_together() -> None:
    """With more rows, each sign test needs a smaller p-value."""
    rows = {"subject": 0.8, "near": 0.85}
    near = Outcomes(content(**rows), 0.01, 2_000).compared(["near"], "subject", ["mixed"])["near"]
    assert near.paired.p_value < 0.05
    assert near.verdict == "above"
    rows |= {f"same {n}": 0.8 for n in range(40)}
    many = Outcomes(content(**rows), 0.01, 2_000).compared([*rows][1:], "subject", ["mixed"])
    assert many["near"].paired == near.paired
    assert many["near"].verdict == "not told apart"


def test_rows_of_some_trainings_are_compared_with_the_same_trainings() -> None:
    found = content(subject=0.8, first=0.8)
    bits = {share: content(x=share)["rows"]["x"]["outcomes"]["both"][0] for share in (0.8, 0.4)}
    found["rows"]["subject"] |= {"outcomes": {"both": [bits[0.8], bits[0.4]]}, "seeds": [0, 1]}
    found["rows"]["first"] |= {"outcomes": {"both": [bits[0.4]]}, "seeds": [1]}
    outcomes = Outcomes(found, 0.05, 500)
    paired = outcomes.compared(["first"], "subject", ["mixed"])["first"].paired
    assert (paired.difference.mean, paired.wins, paired.losses) == (0, 0, 0)
    found["rows"]["first"]["seeds"] = None  # it has no training
    outcomes = Outcomes(found, 0.05, 500)
    paired = outcomes.compared(["first"], "subject", ["mixed"])["first"].paired
    assert paired.difference.mean == pytest.approx(-0.2, abs=0.1)


def test_the_summary_has_all_figures_of_a_test() -> None:
    found = content(**{AFA: 0.9, "distilled": 0.5, "base": 0.4})
    found["planned"].append("later")
    found["rows"]["base"] |= {"trained": [], "seconds": None}
    outcomes = Outcomes(found, 0.05, 500)
    (test,) = summary({(Experiment.MAIN, "main"): outcomes})
    json.dumps(test)
    assert test["not_measured"] == ["later"]
    assert test["prompts"]["mixed"] == 120
    first, second, _ = test["rows"]
    assert first["row"] == AFA
    assert not first["minus_afa"]
    share = outcomes.mean("distilled", ["mixed"])
    assert second["both"]["mixed"]["low"] == pytest.approx(share.low, abs=1e-4)
    assert second["minus_afa"].keys() == {"mixed", "animals", "food", "things"}
    assert second["minus_afa"]["mixed"]["verdict"] == "below"
    assert second["fid"] == {"mean": 0.5, "low": 0.4, "high": 0.6}
    # the first row has 0 steps, which stands for those of AFA, and 3,000; students 2,000 twice
    trained = (0.2 + 0.1) * 3_000 + (0.2 + 0.1) * 2_000
    drawn = 2 * 0.5 * len(found["prompts"])
    assert test["hours"] == {
        "trainings": pytest.approx(trained / 3600, abs=0.01),
        "pictures": pytest.approx(drawn / 3600, abs=0.01),
    }


def test_the_front_of_quality_against_cost(outcomes: Outcomes) -> None:
    assert outcomes.total("high") == 7
    assert outcomes.front("expert_calls", outcomes.mixed) == ["low", "high"]
    dear = content(dear=0.9, cheap=0.9)
    dear["rows"]["cheap"]["expert_calls"] = 1
    dear["rows"]["unknown"] = {**dear["rows"]["cheap"], "expert_calls": None}
    assert Outcomes(dear, 0.05, 10).front("expert_calls", ["mixed"]) == ["cheap"]


def test_the_page_says_what_speaks_against_the_method_first(tmp_path: Path) -> None:
    rows = {"oracle mask": 1.0, AFA: 0.9, "tuned base (3,000 steps)": 0.9, "TIES merge": 0.4}
    rows |= {"AFA (500 steps, 100 pictures)": 0.6, "AFA (500 steps, 1,000 pictures)": 0.8}
    rows |= {"AFA without prompt": 0.95, "base": 0.5, "expert: food": 0.9, "expert: things": 1.0}
    found = content(**rows)
    with refusal("AFA-STUDY-017", "results.md"):
        write_page(tmp_path, StudySettings())
    (tmp_path / "results").mkdir()
    for experiment, worlds in WORLDS_OF.items():
        for world in worlds:
            path = tmp_path / "results" / f"{experiment}-{world}.json"
            path.write_text(json.dumps(found))
    (tmp_path / "results.md").write_text("# Title\n")
    with refusal("AFA-STUDY-021", "main-main"):
        write_page(tmp_path, StudySettings(num_resamples=500))
    page = Path(__file__).parents[3] / "docs" / "results.md"
    (tmp_path / "results.md").write_text(page.read_text())
    write_page(tmp_path, StudySettings(num_resamples=500))
    text = (tmp_path / "results.md").read_text()
    kept = re.compile(r"(?s)<!-- begin .*?<!-- end ")
    assert kept.sub("", text) == kept.sub("", page.read_text()), "only tables are replaced"
    assert "Not measured yet" not in text
    sentences = text.split("begin main-main-says")[1].split("end main-main-says")[0].splitlines()
    assert "significantly above AFA" in sentences[2]
    assert "oracle mask" in sentences[2]
    assert "not told apart from AFA" in sentences[3]
    assert "tuned base" in sentences[3]
    claims = text.split("begin claims")[1]
    assert "| adaptive fusion beats the best static merge | TIES merge |" in claims
    assert "the opposite holds" in next(
        line for line in claims.splitlines() if "AFA without prompt" in line
    )
    assert "| fusing blocks beats fusing predictions only | predictions only |  | not" in claims
    again = text
    write_page(tmp_path, StudySettings(num_resamples=500))
    assert (tmp_path / "results.md").read_text() == again
    assert f"| main | main | {len(rows)} |" in text
    tests = json.loads((tmp_path / "results.json").read_text())
    assert len(tests) == sum(map(len, WORLDS_OF.values()))
    pictures = {path.name for path in (tmp_path / "images").iterdir()}
    assert pictures == {f"results-{n}.png" for n in ("answer", "experts", "fronts")}
    table = text.split("begin data ")[1].split("end data")[0]
    assert "| 100 | 1,000 | 48,000 |" in table
    edges = text.split("begin edges")[1].split("end edges")[0]
    assert "TIES merge: density; tuned base: learning rate 0.001." in edges
    assert "| AFA | 0.5" in table or "| AFA | 0.6" in table
    assert len(text.split("begin divergence ")[1].split("end divergence")[0].splitlines()) > 6


def test_each_group_of_private_knowledge_has_sentences() -> None:
    found = content(**{AFA: 0.9, "tuned base": 0.5, "base": 0.9})
    kinds = {"mixed": "known x known", "animals": "known x private", "food": "private x private"}
    found["prompts"] = [[caption, kinds.get(group, group)] for caption, group in found["prompts"]]
    found["mixed"] = [*kinds.values()]
    said = sentences(Outcomes(found, 0.05, 200))
    for group in found["mixed"]:
        listed = [each for each in said if each.startswith(f"On {group} pairs, AFA draws 0.")]
        assert any("below AFA:** tuned base 0." in each for each in listed), group
        assert len(listed) == 2
    assert "By FID, on known x known pairs, 0 of 2 rows are nearer" in " ".join(said)
    assert not any("two experts, AFA" in each for each in said)


def test_the_main_experiment_is_the_last_place_of_lines() -> None:
    def outcomes(**shares: float) -> Outcomes:
        return Outcomes(content(**shares), 0.05, 100)

    near, far = outcomes(**{AFA: 0.6, "base": 0.5}), outcomes(**{AFA: 0.9, "drafts": 0.8})
    near.content["divergence"] = {"animals": 0.1, "food": 0.2}
    few = outcomes(**{"AFA (3,000 steps, 100 pictures)": 0.6})
    found = {
        (Experiment.MAIN, "main"): far,
        (Experiment.DIVERGENCE, "after-200"): near,
        (Experiment.DATA, "main"): few,
    }
    lines = lines_of_worlds(found, Experiment.DIVERGENCE)
    assert lines.keys() == {AFA, "base"}, "rows that only the main experiment has are no lines"
    assert [place for place, _ in lines[AFA]] == pytest.approx([0.15, 0.4])
    assert lines[AFA][1][1] == far.mean(AFA, far.mixed)
    (curve,) = lines_of_data(found).values()
    assert [place for place, _ in curve] == [100, 48_000]
    assert lines_of_data({(Experiment.MAIN, "main"): far}) == {}
    assert lines_of_worlds({(Experiment.MAIN, "main"): far}, Experiment.DIVERGENCE) == {}


def test_more_steps_are_needed_to_say_that_few_suffice() -> None:
    found = content(**{AFA: 0.9, "AFA, 5 denoising steps": 0.5, "TIES merge": 0.4})
    found["rows"][AFA]["expert_calls"], found["rows"]["TIES merge"]["expert_calls"] = 60, 20
    found["rows"]["AFA, 5 denoising steps"]["expert_calls"] = 30
    found["planned"].append("AFA, 20 denoising steps")
    line = f"| {FEW_STEPS} | AFA, 20 denoising steps |"
    assert f"{line}  | not measured |" in claims_table(Outcomes(found, 0.05, 100))
    found["rows"]["AFA, 20 denoising steps"] = {**found["rows"][AFA], "expert_calls": 120}
    (found_line,) = [x for x in claims_table(Outcomes(found, 0.05, 100)) if x.startswith(line)]
    assert "not measured" not in found_line


def test_tests_with_a_part_of_their_rows(tmp_path: Path) -> None:
    found = content(**{"base": 0.5, AFA: 0.9})
    found["planned"].append("tuned base")
    (tmp_path / "results").mkdir()
    page = tmp_path / "results.md"
    shown = (Path(__file__).parents[3] / "docs" / "results.md").read_text()
    path = tmp_path / "results" / "main-main.json"

    def table() -> str:
        page.write_text(shown)
        path.write_text(json.dumps(found))
        write_page(tmp_path, StudySettings(num_resamples=100))
        return page.read_text().split("begin main-main ")[1].split("end main-main")[0]

    assert "Not measured yet: tuned base." in table()
    del found["rows"][AFA]
    assert table() == shown.split("begin main-main ")[1].split("end main-main")[0]
