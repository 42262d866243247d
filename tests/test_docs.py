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
from benchmarks import page
from benchmarks.soak.page import as_page
from fuzz.run import READERS
from fuzz.run import table as fuzzed
from fuzz.targets import TARGETS
from tests.reliability import faults_in, table
from tools import nightly

ROOT = Path(__file__).parents[1]


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


@pytest.mark.slow
def test_the_results_page_is_made_of_the_outcomes(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    shutil.copytree(docs / "results", tmp_path / "results", ignore=lambda *_: ["worlds"])
    shutil.copyfile(docs / "results.md", tmp_path / "results.md")
    write_page(tmp_path, StudySettings())
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()


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
