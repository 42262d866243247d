"""Recipes from the web: bounded, without code, and with paths where the user has put them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from afa.errors import AfaError
from afa.evaluation.recipe import load_evaluate_recipe
from afa.policy import trusting
from afa.recipe import read_yaml
from afa.training.recipe import load_recipe
from tests.refusal import refusal

TRAIN = "experts: [{}]\ndata: {{scenes: {{}}}}\ntraining: {{num_steps: 1}}\n"


def written(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['touch x']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("&a [*a]", "contains itself"),
        ("a: &x {b: *x}", "contains itself"),
        ("[" * 40 + "]" * 40, "more than 32 levels"),
        ("[" * 100_000, "r.yaml"),
        ("a: 2001-99-99", "r.yaml"),
        ("a: " + "9" * 5000, "r.yaml"),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("? [1, 2]\n: 3", "r.yaml"),
        ("\ud800", "r.yaml"),
        ("a: \x07", "r.yaml"),
        ("%TAG ! x\n---\na: !b c", "r.yaml"),
    ],
)
def test_texts_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(AfaError, match=message) as error:
        read_yaml(tmp_path / "r.yaml")
    assert error.value.code == ("AFA-RECIPE-003" if text == "\ud800" else "AFA-RECIPE-006")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("x"))


@pytest.mark.fault(
    "a hostile recipe",
    "train",
    how="aliases that expand to 10^12 entries",
    holds="refused in one line",
)
def test_aliases_of_aliases(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    place = written(tmp_path, "\n".join(lines))
    with refusal("AFA-RECIPE-006", "100000"):
        load_recipe(place)


def test_an_alias_is_a_fine_thing(tmp_path: Path) -> None:
    place = written(tmp_path, "a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 3}\n")
    assert read_yaml(place) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2], "e": 3}}


def test_large_files_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    with refusal("AFA-RECIPE-004", "1000000"):
        load_recipe(tmp_path / "large.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with refusal("AFA-RECIPE-004"):
        load_recipe(tmp_path / "pipe.yaml")


def test_a_thousand_mistakes_are_one_line(tmp_path: Path) -> None:
    place = written(tmp_path, "\n".join(f"key{n}: {'x' * 100}" for n in range(1000)))
    with refusal("AFA-RECIPE-002", "99[0-9]") as error:
        load_recipe(place)
    assert len(str(error.value)) < 5000


@pytest.mark.fault(
    "a hostile recipe",
    "train",
    how="paths to other folders, in every place that accepts a path",
    holds="refused until the user allows the folder",
)
@pytest.mark.parametrize(
    "changes",
    [
        "experts: [../secret]",
        "experts: [~/secret]",
        "experts: [/etc/secret]",
        "experts: [{base: ./b, lora: ../l.safetensors}]",
        "vae: ../vae",
        "config: ../config",
        "parts: [../part]",
        "data: {folder: ../pictures}",
        "data: {scenes: {}, cache_folder: ../../cache}",
        "data: {dataset: {path: ../rows}}",
        "data: {dataset: {path: json, data_files: ../rows.json}}",
    ],
)
def test_paths_that_lead_out_of_a_recipes_folder(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AFA_FOLDERS")
    kept = [line for line in TRAIN.format("./a").splitlines() if line[:4] != changes[:4]]
    place = written(tmp_path / "web", "\n".join([*kept, changes]))
    with refusal("AFA-POLICY-001", "--allow-folder"):
        load_recipe(place)
    with trusting(folders=(Path("/etc"), Path.home(), tmp_path.parent)):
        load_recipe(place)
    monkeypatch.setenv("AFA_FOLDERS", os.pathsep.join(["/etc", str(Path.home()), str(tmp_path)]))
    if "../.." not in changes:
        load_recipe(place)


@pytest.mark.parametrize("file", ["file:///etc/passwd", "local:///etc", "zip://*::file:///a.zip"])
def test_addresses_are_no_way_around(file: str, tmp_path: Path) -> None:
    changes = TRAIN.format("./a").replace(
        "scenes: {}", f"dataset: {{path: json, data_files: '{file}'}}"
    )
    with refusal("AFA-TRAIN-043"):
        load_recipe(written(tmp_path, changes))


def test_the_current_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFA_FOLDERS")
    place = written(tmp_path / "recipes", TRAIN.format("../experts/a"))
    with refusal("AFA-POLICY-001", "--allow-folder"):
        load_recipe(place)
    monkeypatch.chdir(tmp_path)
    (expert,) = load_recipe(place).experts
    assert expert.source == str(tmp_path / "experts" / "a")


def test_prompts_of_a_comparison_are_held_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AFA_FOLDERS")
    text = (
        "prompts: {text: /etc/passwd}\nmethods: [{name: a, model: ./a}]\n"
        "metrics: [{name: clip_t, weights: a/b}]\n"
    )
    with refusal("AFA-POLICY-001", "'/etc/passwd'"):
        load_evaluate_recipe(written(tmp_path, text))


def test_a_picture_folder_names_its_own_pictures(tmp_path: Path) -> None:
    from afa.training.data.folder import FolderImages

    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"")
    for name in ("../out.png", str(tmp_path / "out.png"), "a/../../out.png", "."):
        line = f'{{"file_name": "{name}", "text": "a fox"}}'
        (tmp_path / "in" / "metadata.jsonl").write_text(line)
        with refusal("AFA-TRAIN-009", re.escape(name)):
            FolderImages(tmp_path / "in")
