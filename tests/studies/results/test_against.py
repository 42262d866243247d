"""Methods of others enter a published test: its prompts and noise, beside its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from afa.evaluation.run import evaluate
from afa.studies.results.against import (
    COMPARISON,
    REBUILT,
    ROWS,
    TABLES,
    against_recipe,
    read_published,
    write_against,
    write_inputs,
)
from afa.studies.worlds.recipe import WORLDS
from afa.zoo import export_zoo
from afa.zoo.scenes import parse_caption
from tests.refusal import refusal

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
        "world": "main",
        "description": WORLDS["main"].model_dump(mode="json", exclude={"start"}),
        "sampling": {"num_steps": 2, "guidance": 3.0, "seeds": [11], "batch_size": 4},
        "num_references": 12,
        "margin": 0.05,
        "prompts": PROMPTS,
        "mixed": ["mixed"],
        "rows": {"base": row, "AFA": row},
        "real": {"fid": 0.1, "kid": 0.0, "cmmd": 0.01},
    }
    path = tmp_path / "main-main.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled models in the place of a world."""
    folder = tmp_path_factory.mktemp("models") / "main"
    export_zoo(folder)
    description = WORLDS["main"].model_dump(mode="json", exclude={"start"})
    (folder / "recipe.json").write_text(json.dumps(description))
    return folder


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_given_pictures_are_compared_with_all_published_rows(
    published: Path, world: Path, tmp_path: Path
) -> None:
    (tmp_path / "drawn").mkdir()
    for number, (caption, _) in enumerate(PROMPTS):
        real = Image.fromarray(parse_caption(caption).render())
        real.save(tmp_path / "drawn" / f"{number:06d}.png")
    file = write(
        tmp_path / "mine.yaml",
        base=str(world / "base"),
        methods=[{"name": "mine", "pictures": "drawn"}],
        trained_on={"mine": 1_234},
    )
    found, output = read_published(published), tmp_path / "out"
    recipe, asked = against_recipe(file, found, output)
    assert recipe.sampling.seeds == [11]
    assert (recipe.sampling.num_steps, recipe.sampling.guidance) == (2, 3)
    for _ in range(2):  # the second time resumes
        write_inputs(found, output)
    listed = (output / "inputs" / "prompts.csv").read_text().splitlines()[1:]
    assert [line.split('"')[1] for line in listed] == [caption for caption, _ in PROMPTS]
    for _ in evaluate(recipe, output / COMPARISON):
        pass
    write_against(recipe, asked, found, output)
    rows = json.loads((output / ROWS).read_text())["rows"]
    assert rows.keys() == {"mine", REBUILT}
    assert rows["mine"]["outcomes"]["both"] == ["1111"]
    assert rows["mine"]["sets"]["cmmd"][0]["value"] < 9
    text = (output / TABLES).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(line.startswith("| mine | 1.00") and "| 1,234 |" in line for line in lines)
    assert any(line.startswith(f"| {REBUILT} |") and "| unknown |" in line for line in lines)
    assert any(line.startswith("| AFA | 0.00") and "-1.00 [" in line for line in lines)
    assert "The base that was built here minus the published one" in text
    assert "not recorded" not in text

    other = {**found, "sampling": {**found["sampling"], "seeds": [12]}}
    with refusal("AFA-EVAL-030", "sampling"):
        write_inputs(other, output)


def test_what_a_recipe_against_a_test_cannot_have(
    published: Path, world: Path, tmp_path: Path
) -> None:
    found, output = read_published(published), tmp_path / "out"

    def read(**content: Any) -> None:
        against_recipe(write(tmp_path / "mine.yaml", **content), found, output)

    method = {"name": "mine", "model": str(world / "animals")}
    read(methods=[method])
    with refusal("AFA-STUDY-019", "AFA"):
        read(methods=[{**method, "name": "AFA"}])
    with refusal("AFA-STUDY-019", "rebuilt"):
        read(methods=[{**method, "name": REBUILT}])
    with refusal("AFA-STUDY-020", "other"):
        read(methods=[method], trained_on={"other": 1})
    for content, word in (
        ({"methods": [method], "sampling": {"num_steps": 50}}, "sampling"),
        ({"methods": [method], "prompts": {"text": "a.txt"}}, "prompts"),
        ({"methods": [method, method]}, "distinct"),
        ({"methods": [{"name": "f", "fusion": {"rule": "feature_mean"}}]}, "experts"),
        ({"methods": [{**method, "name": "base rebuilt"}], "base": str(world / "base")}, "differ"),
        ({"methods": [method], "trained_on": {"mine": -5}}, "trained_on"),
    ):
        with refusal("AFA-RECIPE-002", word):
            read(**content)
    assert not output.exists(), "nothing is written before it is refused"


def test_models_that_know_the_test_or_are_of_another_world(
    published: Path, world: Path, tmp_path: Path
) -> None:
    found = read_published(published)

    def read(**content: Any) -> None:
        against_recipe(write(tmp_path / "mine.yaml", **content), found, tmp_path / "out")

    with refusal("AFA-STUDY-024", "zoo:ensemble"):
        read(methods=[{"name": "mine", "ensemble": "zoo:ensemble"}])
    with refusal("AFA-STUDY-024", "zoo:base"):
        read(base="zoo:base", methods=[{"name": "mine", "model": str(world / "food")}])
    method = {"name": "mine", "ensemble": str(tmp_path / "ensemble")}
    for hold_out, expert, is_refused in (
        ("tenth", "a", True),
        ("fifth", "zoo:food", True),
        ("fifth", "a", False),
    ):
        (tmp_path / "ensemble").mkdir(exist_ok=True)
        recipe = {"data": {"scenes": {"hold_out": hold_out}}, "experts": [{"source": expert}]}
        (tmp_path / "ensemble" / "recipe.json").write_text(json.dumps(recipe))
        if is_refused:
            with refusal("AFA-STUDY-024", "hold_out: fifth"):
                read(methods=[method])
        else:
            read(methods=[method])
    found["description"]["num_scenes"] = 7
    with refusal("AFA-STUDY-025", "main"):
        read(base=str(world / "base"), methods=[method])


def test_files_without_outcomes_and_folders_with_others(published: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": {}}')
    with refusal("AFA-STUDY-018", "other.json"):
        read_published(tmp_path / "other.json")
    with refusal("AFA-STUDY-018", "none.json"):
        read_published(tmp_path / "none.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with refusal("AFA-STUDY-026", "mine"):
        write_inputs(read_published(published), tmp_path / "mine")
