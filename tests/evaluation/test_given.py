"""Pictures that another program drew, in a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from afa.distilling.recipe import TeacherRecipe
from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe
from afa.evaluation.run import evaluate
from afa.preflight.inputs import inputs_of_evaluation
from tests.evaluation.conftest import SMALL
from tests.refusal import refusal


def recipe_of(*methods: dict[str, Any], **changes: Any) -> EvaluateRecipe:
    few: dict[str, Any] = {"prompts": {"zoo": {"kinds": {"mixed": 2, "animals": 1}}}}
    few |= {"curve": None, "metrics": ["scenes"]}
    return EvaluateRecipe.model_validate({**SMALL, **few, "methods": list(methods), **changes})


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {row["method"]: row for row in report["rows"]}


BASE = {"name": "base", "model": "zoo:base"}


@pytest.mark.slow
def test_pictures_score_as_those_of_the_model_that_drew_them(tmp_path: Path) -> None:
    list(evaluate(recipe_of(BASE), tmp_path / "first"))
    given = tmp_path / "given"
    for seed in (0, 1):
        drawn = tmp_path / "first" / "methods" / "base" / "replica-0" / f"seed-{seed}" / "steps-2"
        shutil.copytree(drawn, given / f"seed-{seed}")
    mine = {"name": "mine", "pictures": str(given)}
    list(evaluate(recipe_of(BASE, mine), tmp_path / "first"))
    rows = report_of(tmp_path / "first")
    assert rows["mine"]["groups"] == rows["base"]["groups"]
    assert rows["mine"]["kind"] == "pictures"
    assert rows["mine"]["expert_calls_per_image"] is None
    assert rows["mine"]["measured"] == {"seconds_per_image": None, "peak_memory_mib": None}
    lines = (tmp_path / "first" / "report.md").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith("| mine") and "unknown" in each][:1]
    assert line.endswith("| unknown | unknown | unknown |")

    (given / "costs.json").write_text('{"expert_calls": 80, "seconds": 0.5}')
    with refusal("AFA-EVAL-030", "mine", "costs"):
        list(evaluate(recipe_of(BASE, mine), tmp_path / "first"))
    list(evaluate(recipe_of(BASE, mine), tmp_path / "second"))
    row = report_of(tmp_path / "second")["mine"]
    assert row["expert_calls_per_image"] == 80
    assert row["measured"]["seconds_per_image"] == 0.5

    (given / "seed-1" / "000001.png").unlink()
    found = inputs_of_evaluation(recipe_of(mine), None, lambda *_: None)
    assert [each.code for each in found.findings if each.level == "error"] == ["AFA-EVAL-032"]
    with refusal("AFA-EVAL-032", "seed-1", "000001.png"):
        list(evaluate(recipe_of(mine), tmp_path / "third"))


def test_costs_that_are_none(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{n:06d}.png")
    (tmp_path / "costs.json").write_text('{"seconds": -1}')
    mine = {"name": "mine", "pictures": [str(tmp_path)]}
    sampling = {**SMALL["sampling"], "seeds": [5]}
    with refusal("AFA-EVAL-033", "seconds"):
        list(evaluate(recipe_of(mine, sampling=sampling), tmp_path / "out"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "zoo:base"},
        {"guidance": 1.0},
        {"acceleration": "fast"},
        {"drafts": {"judge": "zoo:base"}},
    ],
)
def test_what_pictures_cannot_have(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"pictures|drafts"):
        MethodRecipe.model_validate({"name": "mine", "pictures": "drawn", **changes})


def test_pictures_teach_nothing_and_have_no_curve() -> None:
    with pytest.raises(ValidationError, match="drawn already"):
        TeacherRecipe.model_validate({"pictures": "drawn"})
    mine = {"name": "mine", "pictures": "drawn"}
    for curve in ({"limit": 1}, {"limit": 1, "methods": ["base"], "also": ["mine"]}):
        with pytest.raises(ValidationError, match="a curve of 'mine'"):
            recipe_of(mine, BASE, curve=curve)
    recipe_of(BASE, mine, curve={"limit": 1, "methods": ["base"]})
    assert "pictures" not in MethodRecipe.model_validate(BASE).model_dump(), "of earlier releases"
