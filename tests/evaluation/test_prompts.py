"""Prompts from every source, and files that are not what they should be."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afa.evaluation.prompts import (
    CocoPrompts,
    PromptsRecipe,
    ZooPrompts,
    groups_of,
    load_prompts,
    resolve_prompts,
    source_warnings,
)
from afa.zoo.scenes import is_held_out, parse_caption
from tests.refusal import refusal


def text_file(folder: Path, content: str, encoding: str = "utf-8") -> PromptsRecipe:
    path = folder / "prompts.txt"
    path.write_bytes(content.encode(encoding))
    return PromptsRecipe(text=path)


@pytest.mark.parametrize(
    "content", ["a fox\na crane\n", "a fox\r\na crane\r\n", "a fox\n a crane "]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_one_prompt_on_each_line(tmp_path: Path, content: str, encoding: str) -> None:
    prompts = load_prompts(text_file(tmp_path, content, encoding))
    assert [prompt.text for prompt in prompts] == ["a fox", "a crane"]
    assert [prompt.group for prompt in prompts] == ["all", "all"]


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("a fox\n\na crane\n", "AFA-EVAL-002", "line 2"),
        ("a fox\n   \n", "AFA-EVAL-002", "line 2"),
        ("a fox\na crane\na fox\n", "AFA-EVAL-004", "line 3 .* line 1: 'a fox'"),
        ("a fox\na fox \n", "AFA-EVAL-004", "line 2 .* line 1"),
        ("", "AFA-EVAL-002", "line 1"),
    ],
)
def test_empty_and_repeated_lines(tmp_path: Path, content: str, code: str, said: str) -> None:
    with refusal(code, said):
        load_prompts(text_file(tmp_path, content))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    recipe = text_file(tmp_path, "a fox")
    assert recipe.text is not None
    recipe.text.write_bytes(b"\xff\xfe\x00")
    with refusal("AFA-EVAL-001", "UTF-8"):
        load_prompts(recipe)
    with refusal("AFA-EVAL-001", "UTF-8"):
        load_prompts(PromptsRecipe(text=tmp_path / "none.txt"))


def coco(folder: Path, annotations: list[dict[str, Any]], pictures: bool = False) -> PromptsRecipe:
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (7, 3, 5)],
        "annotations": annotations,
    }
    path = folder / "captions.json"
    path.write_text(json.dumps(content))
    return PromptsRecipe(
        coco=CocoPrompts(captions=path, pictures=folder / "pictures" if pictures else None)
    )


CAPTIONS = [
    {"id": 11, "image_id": 7, "caption": "A fox sleeps.\n"},
    {"id": 10, "image_id": 7, "caption": "A fox."},
    {"id": 12, "image_id": 3, "caption": "A fox."},  # the same words for another picture
    {"id": 13, "image_id": 3, "caption": "A red fox."},
    {"id": 14, "image_id": 5, "caption": "A crane."},
]


def test_coco_has_one_caption_for_each_picture(tmp_path: Path) -> None:
    prompts = load_prompts(coco(tmp_path, CAPTIONS))
    # the one with the lowest id; two pictures may have the same
    assert [prompt.text for prompt in prompts] == ["A fox.", "A crane.", "A fox."]
    assert all(prompt.reference is None for prompt in prompts)


def test_coco_with_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for n in (3, 5, 7):
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / f"{n:012d}.jpg")
    recipe = coco(tmp_path, CAPTIONS, pictures=True)
    names = [prompt.reference and prompt.reference.name for prompt in load_prompts(recipe)]
    assert names == ["000000000003.jpg", "000000000005.jpg", "000000000007.jpg"]
    (tmp_path / "pictures" / "000000000005.jpg").unlink()
    with refusal("AFA-EVAL-011", r"000000000005\.jpg"):
        load_prompts(recipe)


@pytest.mark.parametrize(
    ("annotation", "code", "said"),
    [
        ({"id": 1}, "AFA-EVAL-006", "image_id"),
        ({"id": 1, "image_id": 99, "caption": "A fox."}, "AFA-EVAL-008", "picture 99"),
        ({"id": 1, "image_id": 3, "caption": " "}, "AFA-EVAL-002", "picture 3"),
    ],
)
def test_coco_that_is_not(tmp_path: Path, annotation: dict[str, Any], code: str, said: str) -> None:
    with refusal(code, said):
        load_prompts(coco(tmp_path, [annotation]))


@pytest.mark.parametrize(
    ("files", "ids", "code", "said"),
    [
        (["a.jpg", "b.jpg"], [1, 1], "AFA-EVAL-007", "id 1, 'a.jpg' and 'b.jpg'"),
        (["x/a.jpg", "y/a.jpg"], [1, 2], "AFA-EVAL-009", "'x/a.jpg' and 'y/a.jpg'"),
    ],
)
def test_coco_whose_pictures_are_mistaken_for_each_other(
    tmp_path: Path, files: list[str], ids: list[int], code: str, said: str
) -> None:
    content = {
        "images": [{"id": n, "file_name": name} for n, name in zip(ids, files, strict=True)],
        "annotations": [{"id": n, "image_id": n, "caption": f"fox {n}"} for n in set(ids)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    (tmp_path / "a.jpg").touch()
    recipe = CocoPrompts(captions=tmp_path / "captions.json", pictures=tmp_path)
    with refusal(code, said):
        load_prompts(PromptsRecipe(coco=recipe))


def test_drawbench_has_its_categories_as_groups(tmp_path: Path) -> None:
    path = tmp_path / "drawbench.csv"
    path.write_text(
        'Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\nA blue car.,Colors\n'
        "A red car.,Conflicting\n"
    )
    prompts = load_prompts(PromptsRecipe(drawbench=path))
    assert [(prompt.text, prompt.group) for prompt in prompts] == [
        ("A red car.", "Colors"),
        ("One cat, two dogs.", "Counting"),
        ("A blue car.", "Colors"),
    ]
    assert groups_of(prompts) == {"Colors": [0, 2], "Counting": [1]}
    (warning,) = source_warnings(PromptsRecipe(drawbench=path))
    assert warning.startswith("1 row of ")
    path.write_text("prompt\nA red car.\n")
    with refusal("AFA-EVAL-013"):
        load_prompts(PromptsRecipe(drawbench=path))
    path.write_text("Prompts,Category\na fox, \n")
    assert [prompt.group for prompt in load_prompts(PromptsRecipe(drawbench=path))] == ["all"]
    path.write_text(f"Prompts,Category\n{'a' * 200_000},Colors\n")
    with refusal("AFA-EVAL-012"):
        load_prompts(PromptsRecipe(drawbench=path))
    path.write_text("Prompts,Category\n,Colors\n")
    with refusal("AFA-EVAL-002", "2"):
        load_prompts(PromptsRecipe(drawbench=path))


def test_a_folder_of_pictures_and_captions(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}\n')
    (prompt,) = load_prompts(PromptsRecipe(folder=tmp_path))
    assert prompt.text == "a fox"
    assert prompt.reference == tmp_path / "a.png"


def test_the_zoo_with_its_true_pictures(tmp_path: Path) -> None:
    recipe = PromptsRecipe(zoo=ZooPrompts(kinds={"mixed": 3, "food": 2}))
    prompts = load_prompts(recipe, tmp_path / "true")
    assert [prompt.group for prompt in prompts] == ["mixed"] * 3 + ["food"] * 2
    for prompt in prompts:
        assert prompt.reference is not None
        with Image.open(prompt.reference) as picture:
            assert picture.tobytes() == parse_caption(prompt.text).render().tobytes()
    assert all(prompt.reference is None for prompt in load_prompts(recipe))


def test_the_zoos_prompts_for_tuning_share_no_pair_with_the_tests() -> None:
    test = load_prompts(PromptsRecipe(zoo=ZooPrompts(kinds={"mixed": 40})))
    tuning = load_prompts(PromptsRecipe(zoo=ZooPrompts(kinds={"mixed": 40}, held_out=False)))
    for prompts, expected in ((test, True), (tuning, False)):
        scenes = [parse_caption(prompt.text) for prompt in prompts]
        assert all(scene.is_mixed for scene in scenes)
        assert {is_held_out(scene.left, scene.right) for scene in scenes} == {expected}


def test_kinds_that_overlap() -> None:
    # as many of both as it takes for one to come twice
    recipe = PromptsRecipe(zoo=ZooPrompts(kinds={"mixed": 600, "any": 600}))
    with refusal("AFA-EVAL-016"):
        load_prompts(recipe)


def test_a_limit_is_for_each_group() -> None:
    zoo = ZooPrompts(kinds={"mixed": 5, "food": 1, "animals": 4})
    prompts = load_prompts(PromptsRecipe(zoo=zoo, limit=2))
    assert [prompt.group for prompt in prompts] == ["mixed", "mixed", "food", "animals", "animals"]


def test_exactly_one_source() -> None:
    with pytest.raises(ValueError, match="exactly one of text, coco"):
        PromptsRecipe()
    with pytest.raises(ValueError, match="exactly one of text, coco"):
        PromptsRecipe(text=Path("a"), drawbench=Path("b"))


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = PromptsRecipe(coco=CocoPrompts(captions=Path("c.json"), pictures=Path("p")))
    resolved = resolve_prompts(recipe, tmp_path).coco
    assert resolved is not None
    assert (resolved.captions, resolved.pictures) == (tmp_path / "c.json", tmp_path / "p")


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("Prompts,Category\na fox, in snow,Animals\n", "AFA-EVAL-015", "2 cells .* line 2 has 3"),
        ('Prompts,Category\n"a fox,A\na bee,A\n', "AFA-EVAL-015", "2 cells .* line 3 has 1"),
        ("Prompts,Category\na fox\n", "AFA-EVAL-015", "2 cells .* line 2 has 1"),
        ("Prompts,Prompts,Category\na,b,c\n", "AFA-EVAL-014", "column Prompts; got 2"),
    ],
)
def test_rows_whose_cells_could_be_others(
    tmp_path: Path, content: str, code: str, said: str
) -> None:
    path = tmp_path / "drawbench.csv"
    path.write_text(content)
    with refusal(code, said):
        load_prompts(PromptsRecipe(drawbench=path))


def test_a_folder_of_references_is_no_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "a fox")
    with refusal("AFA-LOAD-124", "x.zip", "must be a folder"):
        load_prompts(PromptsRecipe(folder=tmp_path / "x.zip"))


@pytest.mark.parametrize(
    "change", [{"caption": None}, {"caption": ["a fox"]}, {"id": 1.5}, {"image_id": True}]
)
def test_coco_whose_values_are_of_other_types(tmp_path: Path, change: dict[str, Any]) -> None:
    annotation = {"id": 1, "image_id": 1, "caption": "a fox", **change}
    path = tmp_path / "captions.json"
    images = [{"id": 1, "file_name": "a.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": [annotation]}))
    with refusal("AFA-EVAL-006"):
        load_prompts(PromptsRecipe(coco=CocoPrompts(captions=path)))
