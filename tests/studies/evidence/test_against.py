"""Methods of others enter a published test: its prompts and noise, beside its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from afa.evaluation.run import evaluate
from afa.studies.evidence.against import (
    COMPARISON,
    REBUILT,
    ROWS,
    TABLES,
    AgainstRecipe,
    against_recipe,
    read_published,
    write_against,
)
from afa.studies.evidence.settings import EvidenceSettings
from afa.zoo.scenes import parse_caption
from tests.refusal import refusal

SETTINGS = EvidenceSettings(num_references=12, num_steps=2, num_resamples=200)
PROMPTS = [
    ["a fox on the left and a pizza on the right, blue background", "mixed"],
    ["a pizza on the left and a guitar on the right, white background", "mixed"],
    ["a fox on the left and a guitar on the right, green background", "mixed"],
    ["a fox on the left and a bee on the right, blue background", "animals"],
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    row = {
        "outcomes": {"both": ["0000"]},
        "sets": {
            name: [{"value": 9.0, "low": 8.0, "high": 10.0}] for name in ("fid", "kid", "cmmd")
        },
        "expert_calls": 20.0,
        "budget": {"base": 96_000, "experts": 0, "own": 0},
    }
    content = {
        "prompts": PROMPTS,
        "mixed": ["mixed"],
        "rows": {"base": row, "AFA": row},
        "real": {"fid": 0.1, "kid": 0.0, "cmmd": 0.01},
    }
    path = tmp_path / "main-main.json"
    path.write_text(json.dumps(content))
    return path


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_given_pictures_are_compared_with_all_published_rows(
    published: Path, tmp_path: Path
) -> None:
    (tmp_path / "drawn").mkdir()
    for number, (caption, _) in enumerate(PROMPTS):
        real = Image.fromarray(parse_caption(caption).render())
        real.save(tmp_path / "drawn" / f"{number:06d}.png")
    file = write(
        tmp_path / "mine.yaml",
        base="zoo:base",
        methods=[{"name": "mine", "pictures": "drawn"}],
        trained_on={"mine": 1_234},
    )
    found, output = read_published(published), tmp_path / "out"
    recipe, asked = against_recipe(file, found, output, SETTINGS)
    assert [prompt[0] for prompt in PROMPTS] == [
        line.split('"')[1]
        for line in Path(recipe.prompts.drawbench or "").read_text().split("\n")[1:-1]
    ]
    assert recipe.sampling.seeds == [SETTINGS.test_seed]
    for _ in evaluate(recipe, output / COMPARISON):
        pass
    write_against(recipe, asked, found, output, SETTINGS)
    rows = json.loads((output / ROWS).read_text())["rows"]
    assert rows.keys() == {"mine", REBUILT}
    assert rows["mine"]["outcomes"]["both"] == ["1111"]
    assert rows["mine"]["sets"]["cmmd"][0]["value"] < 9
    text = (output / TABLES).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(line.startswith("| mine | 1.00") and "| 1,234 |" in line for line in lines)
    assert any(line.startswith(f"| {REBUILT} |") and "| 96,000 |" in line for line in lines)
    assert any(line.startswith("| AFA | 0.00") and "-1.00 [" in line for line in lines)
    assert "The base that was built here is right in" in text


def test_what_a_recipe_against_a_test_cannot_have(published: Path, tmp_path: Path) -> None:
    found = read_published(published)

    def read(**content: Any) -> None:
        file = write(tmp_path / "mine.yaml", **content)
        against_recipe(file, found, tmp_path / "out", SETTINGS)

    method = {"name": "mine", "model": "zoo:base"}
    with refusal("AFA-STUDY-019", "AFA"):
        read(methods=[{**method, "name": "AFA"}])
    with refusal("AFA-STUDY-019", "rebuilt"):
        read(methods=[{**method, "name": REBUILT}])
    with refusal("AFA-STUDY-020", "other"):
        read(methods=[method], trained_on={"other": 1})
    for key, value in (("sampling", {"num_steps": 50}), ("prompts", {"text": "a.txt"})):
        with refusal("AFA-RECIPE-002", key):
            read(methods=[method], **{key: value})
    assert not (tmp_path / "out").exists(), "nothing is written before it is refused"
    assert set(AgainstRecipe.model_fields) >= {"experts", "base", "methods", "trained_on"}


def test_files_without_outcomes(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": {}}')
    with refusal("AFA-STUDY-018", "other.json"):
        read_published(tmp_path / "other.json")
    with refusal("AFA-STUDY-018", "none.json"):
        read_published(tmp_path / "none.json")
