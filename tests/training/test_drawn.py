"""Training pictures that the experts draw from prompts: when they are drawn again, and when not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

import afa
from afa.training import Recipe, TrainStep, train
from afa.training.cache import CacheProgress
from afa.training.data import FolderImages, Joined, SceneImages
from afa.training.drawn import read_prompts
from afa.training.listing import settled_parts
from tests.refusal import refusal
from tests.training.runs import as_written, recipe, steps_of
from tests.warm import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture
def data(experts: list[Path], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("a fox\n\na pizza on the left\n")
    return {
        "prompts": {
            "file": str(tmp_path / "prompts.txt"),
            "drafts": {"judge": str(experts[2]), "num_steps": 1, "num_levels": 2},
            "number": 5,
            "num_steps": 2,
            "batch_size": 2,
        },
        "cache_folder": str(tmp_path / "cache"),
    }


def drawn_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("drawn-*"))


def test_a_training_from_prompts_alone(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    asked = recipe(experts, data)
    events = list(train(asked, tmp_path / "run"))
    assert sum(isinstance(event, TrainStep) for event in events) == 4
    said = [note for e in events if isinstance(e, CacheProgress) for note in e.notes]
    (folder,) = drawn_in(tmp_path)
    assert any(str(folder) in note for note in said)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    count = Counter(row["text"] for row in rows)
    assert set(count) == {"a fox", "a pizza on the left"}
    assert sorted(count.values()) == [2, 3]
    pictures = FolderImages(folder)
    assert {pictures[n][0].size for n in range(5)} == {(16, 16)}
    afa.load_ensemble(tmp_path / "run")


def test_another_run_uses_the_same_pictures(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    list(steps_of(recipe(experts, data), tmp_path / "first"))
    (folder,) = drawn_in(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    list(steps_of(recipe(experts, data, seed=1), tmp_path / "second"))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    changed = json.loads(json.dumps(data))
    changed["prompts"]["drafts"]["sharpness"] = 1.0
    list(steps_of(recipe(experts, changed), tmp_path / "third"))
    assert len(drawn_in(tmp_path)) == 2


def test_other_models_draw_other_pictures(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(experts[1] / "vae", vae)
    judge = tmp_path / "judge"
    shutil.copytree(experts[2], judge)
    with_judge = json.loads(json.dumps(data))
    with_judge["prompts"]["drafts"]["judge"] = str(judge)
    written = as_written(experts, data)
    list(steps_of(Recipe.model_validate(written), tmp_path / "0"))
    list(steps_of(recipe(experts, with_judge), tmp_path / "1"))
    assert len(drawn_in(tmp_path)) == 1, "the same judge at another place"
    list(steps_of(Recipe.model_validate({**written, "vae": str(vae)}), tmp_path / "2"))
    assert len(drawn_in(tmp_path)) == 2
    config = judge / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    list(steps_of(recipe(experts, with_judge), tmp_path / "3"))
    assert len(drawn_in(tmp_path)) == 3


def test_a_lost_picture_is_drawn_again(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    list(steps_of(recipe(experts, data), tmp_path / "first"))
    (folder,) = drawn_in(tmp_path)
    lost = folder / "000003.png"
    before = lost.read_bytes()
    lost.unlink()
    list(steps_of(recipe(experts, data, seed=1), tmp_path / "second"))
    assert lost.read_bytes() == before


@pytest.mark.processes
def test_two_processes_share_the_pictures(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_written(experts, data)))
    ranks = run_ranks(["train", path, "--output", tmp_path / "run"], 2)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    (folder,) = drawn_in(tmp_path)
    together = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(together) == 6
    shutil.rmtree(folder)
    list(steps_of(recipe(experts, data), tmp_path / "alone"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == together


def test_an_interrupted_drawing_goes_on_with_the_same_pictures(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    asked = recipe(experts, data)
    list(steps_of(asked, tmp_path / "whole"))
    (folder,) = drawn_in(tmp_path)
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)

    events = train(asked, tmp_path / "run")
    for event in events:
        if isinstance(event, CacheProgress) and event.stage == "draw pictures" and event.done == 1:
            break
    events.close()  # type: ignore[attr-defined]
    assert len(list(folder.glob("*.png"))) == 2
    assert not (folder / "metadata.jsonl").exists()
    first = list(islice(steps_of(asked, tmp_path / "run"), 2))
    assert [step.step for step in first] == [1, 2]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    shutil.rmtree(folder)  # a cache can be deleted at any time, also between steps
    list(steps_of(asked, tmp_path / "run"))
    tensors = [load_file(tmp_path / n / "aggregators.safetensors") for n in ("whole", "run")]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_drawn_pictures_beside_real_ones(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    both = {**data, "scenes": {"num_samples": 20}}
    assert len(list(steps_of(recipe(experts, both), tmp_path / "run"))) == 4
    (folder,) = drawn_in(tmp_path)
    joined = Joined(SceneImages(20), FolderImages(folder))
    assert len(joined) == 25
    assert joined.name(19) == "scene 19"
    assert joined.name(20).endswith("000000.png")
    assert joined[21][1] == FolderImages(folder)[1][1]
    assert joined.stored(24) == FolderImages(folder).stored(4)
    other = Joined(SceneImages(20, seed=1), FolderImages(folder))
    assert settled_parts(joined) != settled_parts(other)


def test_drawn_pictures_are_a_bucket_beside_real_ones(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(4):
        Image.new("RGB", (60, 20), (60 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("a fox")
    data = {**data, "folder": str(folder), "buckets": True}
    events = list(train(recipe(experts, data, num_steps=8), tmp_path / "run"))
    notes = [note for event in events for note in event.notes]
    assert any("Buckets: 5 of 16x16, 4 of 26x8;" in note for note in notes), notes
    assert sum(isinstance(event, TrainStep) for event in events) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"scenes": {"num_samples": 5}, "folder": "pictures"},
        {"dataset": {"path": "pictures", "streaming": True}},
        {"limit": 3},
    ],
    ids=str,
)
def test_what_does_not_go_together(
    experts: list[Path], data: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match="must"):
        Recipe.model_validate(as_written(experts, {**data, **changes}))


def test_files_without_prompts(tmp_path: Path) -> None:
    with refusal("AFA-TRAIN-056"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with refusal("AFA-TRAIN-057"):
        read_prompts(tmp_path / "empty.txt")


def test_offloaded_experts_do_not_draw(
    experts: list[Path], data: dict[str, Any], tmp_path: Path
) -> None:
    offloaded = recipe(experts, data, offload_experts=True)
    with refusal("AFA-TRAIN-058"):
        list(train(offloaded, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    list(steps_of(recipe(experts, data, num_steps=1), tmp_path / "other"))
    assert len(list(steps_of(offloaded, tmp_path / "run"))) == 4, "the pictures are drawn"
