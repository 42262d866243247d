"""What pages say besides code: files that exist, data sets that are recipes, figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from afa.studies.results.page import write_page
from afa.studies.results.settings import StudySettings
from afa.training.recipe import DatasetRecipe
from afa.zoo import EXPERTS
from benchmarks import page
from benchmarks.soak.page import as_page
from fuzz.run import READERS
from fuzz.run import table as fuzzed
from fuzz.targets import TARGETS
from tests.reliability import faults_in, table
from tools import nightly

ROOT = Path(__file__).parents[1]
SETS = ("fid", "kid", "cmmd")


def test_data_sets_that_training_names_are_recipes() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    sources = re.findall(r"`dataset: (\{.*\})`", text)
    assert len(sources) >= 3
    for source in sources:
        DatasetRecipe.model_validate(yaml.safe_load(source))


def test_the_readme_has_what_the_demo_came_to() -> None:
    report = json.loads((ROOT / "docs" / "demo.json").read_text())
    rows = [
        f"| {row['method']} | {both['mean']:.2f} [{both['low']:.2f}, {both['high']:.2f}] "
        f"| {row['seconds_per_image']:.2f} |"
        for row in report["rows"]
        for both in [row["both"]]
    ]
    assert len(rows) == 10
    assert "\n".join(rows) in (ROOT / "README.md").read_text()


def test_the_readme_quotes_the_results() -> None:
    test = json.loads((ROOT / "docs" / "results.json").read_text())[0]
    rows = {row["row"]: row for row in test["rows"]}

    def share(row: str, group: str = "mixed") -> str:
        return f"{rows[row]['both'][group]['mean']:.2f}"

    def whole(row: str) -> str:
        found = rows[row]["both"]["mixed"]
        return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    def minus(row: str) -> str:
        found = rows[row]["minus_afa"]["mixed"]
        return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"

    def calls(row: str) -> str:
        return f"{rows[row]['expert_calls']:.0f}"

    def says(row: str, group: str = "mixed") -> str:
        verdict: str = rows[row]["minus_afa"][group]["verdict"]
        return verdict

    merge = max((row for row in rows if "merge" in row), key=lambda row: float(share(row)))
    few, tuned = "top-2, by step", "tuned base (3,000 steps)"
    domains = {
        row: "{}, {} and {}".format(*(share(row, name) for name in EXPERTS))
        for row in (tuned, "AFA")
    }
    trained = {row: f"{sum(rows[row]['trained_on'].values()):,}" for row in (tuned, "AFA")}
    text = " ".join((ROOT / "README.md").read_text().split())
    for quoted in (
        f"on {test['prompts']['mixed']} prompts",
        f"gets {whole(tuned)} and AFA {whole('AFA')}: {minus(tuned)}, not told apart",
        f"saw {trained[tuned]} pictures, those of AFA and its experts {trained['AFA']}",
        f"it gets {domains[tuned]}, AFA {domains['AFA']}; on food it is significantly below",
        f"It gets {whole('predictions only')}, AFA {whole('AFA')}",
        f"{minus('predictions only')}, is not significant",
        f"AFA draws {domains['AFA']}",
        f"the best merge of these experts gets {whole(merge)}",
        f"gets {whole('oracle mask')}",
        f"part of the way:** {whole('drafts')}, the base {whole('base')}",
        f"need {calls('drafts')} calls of a denoiser for a picture, AFA {calls('AFA')}",
        f"This gets {whole(few)}, equivalent to AFA",
        f"with {calls(few)} instead of {calls('AFA')} calls",
    ):
        assert quoted in text, quoted
    assert {says("predictions only"), says(tuned)} == {"not told apart"}
    assert says(tuned, "food") == "below"
    for row in (tuned, "drafts"):
        assert all(rows[row][name]["mean"] < rows["AFA"][name]["mean"] for name in SETS)
    assert says(few) == "equivalent"
    assert {says(f"expert: {name}", name) for name in EXPERTS} == {"not told apart"}
    assert share(merge) == share("base")


@pytest.mark.slow
def test_the_results_page_is_made_of_the_outcomes(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    shutil.copytree(docs / "results", tmp_path / "results", ignore=lambda *_: ["worlds"])
    shutil.copyfile(docs / "results.md", tmp_path / "results.md")
    write_page(tmp_path, StudySettings())
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_text() == (docs / name).read_text()


def test_files_on_the_map_exist() -> None:
    named = re.findall(r"`((?:src|tests)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 6
    assert all((ROOT / name).exists() for name in named)


def test_every_fault_that_is_provoked_is_in_the_table() -> None:
    rows = json.loads((ROOT / "docs" / "reliability.json").read_text())
    assert {row["test"] for row in rows} == faults_in(ROOT / "tests")
    assert table(rows) in (ROOT / "docs" / "reliability.md").read_text()
    assert [row["test"] for row in rows if row["failed"] or not row["passed"]] == []


def test_every_reader_that_is_fuzzed_is_in_the_table() -> None:
    report = json.loads((ROOT / "docs" / "fuzz.json").read_text())
    assert {found["target"] for found in report["targets"]} == set(TARGETS)
    assert set(report["lines"]) == set(READERS)
    assert fuzzed(report) in (ROOT / "docs" / "reliability.md").read_text()


def test_the_soak_that_is_shown_was_flat() -> None:
    summary = json.loads((ROOT / "docs" / "soak.json").read_text())
    assert as_page(summary) in (ROOT / "docs" / "reliability.md").read_text()
    assert (ROOT / "docs" / "images" / "soak.png").exists()


def test_the_benchmark_page_is_made_of_its_figures() -> None:
    assert (page.DOCS / "benchmarks.md").read_text() == page.as_page(page.committed())


def test_the_benchmark_page_says_which_rival_is_as_good() -> None:
    kept = page.committed()
    assert "Every row of another method is significantly lower" in page.as_page(kept)
    (pair,) = (
        pair
        for pair in kept["study"]["results"]["paired"]
        if (pair["against"], pair["score"]) == ("base: fast", "both")
    )
    pair["difference"] = {"mean": 0.01, "low": -0.02, "high": 0.04}
    assert "The fastest such row of another method is *base: fast*" in page.as_page(kept)


def test_the_last_nightly_run_is_the_recorded_one() -> None:
    assert nightly.line(nightly.recorded()) in nightly.PAGE.read_text()
