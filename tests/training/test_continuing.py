"""A run continues with what it began with, or says what is another now."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import afa
from afa.preflight.inputs import inputs_of_training
from afa.training import Checkpoints, Recipe, SceneImages, Transform, train, train_aggregators
from tests.refusal import refusal
from tests.training.runs import SMALL, as_written, recipe, steps_of
from tests.training.test_split import folder_of, write


def of_folder(
    experts: list[Path], place: Path, num_steps: int, *, validates: bool = False
) -> Recipe:
    data = {"folder": str(place), "cache": False}
    written = as_written(experts[:1], data, num_steps=num_steps)
    if validates:
        written["validation"] = {"num_samples": 2}
    return Recipe.model_validate(written)


def replace_unseen(place: Path) -> None:
    """Another picture with the name, size and time of the old one."""
    file = place / "2.png"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def edit_caption(place: Path) -> None:
    list_file = place / "metadata.jsonl"
    list_file.write_text(list_file.read_text().replace("caption 0 of 3", "another"))


def add_line(place: Path) -> None:
    Image.new("RGB", (16, 16), "white").save(place / "new.png")
    with (place / "metadata.jsonl").open("a") as lines:
        lines.write('\n{"file_name": "new.png", "text": "new"}')


def remove_line(place: Path) -> None:
    lines = (place / "metadata.jsonl").read_text().splitlines()
    (place / "metadata.jsonl").write_text("\n".join(lines[1:]))


def remove_one_of_two(place: Path) -> None:
    lines = (place / "metadata.jsonl").read_text().splitlines()
    (place / "metadata.jsonl").write_text("\n".join(lines[:-1]))


def reorder(place: Path) -> None:
    lines = (place / "metadata.jsonl").read_text().splitlines()
    random.Random(1).shuffle(lines)
    (place / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def begun(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a folder, and that folder."""
    place = tmp_path_factory.mktemp("begun")
    lines = folder_of(place / "data", 5)
    write(place / "data", [*lines, ("4.png", "caption 0 of 4")])
    list(steps_of(of_folder(experts, place / "data", 1), place / "run"))
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            replace_unseen,
            r"1 sample with new pictures \(first: .*/2.png\), 1 picture missing",
        ),
        (edit_caption, r"1 sample with changed captions \(first: .*/3.png\)"),
        (add_line, r"1 sample with new pictures \(first: .*/new.png\)"),
        (remove_line, "1 picture missing"),
        (remove_one_of_two, "5 samples instead of 6"),
        (reorder, "the samples are in another order"),
    ],
)
def test_other_data_is_refused(
    experts: list[Path], begun: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    run = shutil.copytree(begun / "run", tmp_path / "run")
    kept = shutil.copytree(begun / "data", tmp_path / "kept")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    try:
        change(begun / "data")
        with refusal("AFA-TRAIN-006", f"{said}"):
            list(steps_of(of_folder(experts, begun / "data", 2), run))
        assert all(path.read_bytes() == content for path, content in before.items())
    finally:
        shutil.rmtree(begun / "data")
        shutil.copytree(kept, begun / "data")  # with other inodes and times of change


def test_the_same_files_copied_again_continue(
    experts: list[Path], begun: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(begun / "run", tmp_path / "run")
    for file in (begun / "data").glob("*.png"):
        os.utime(file, ns=(1, 1))
    assert [s.step for s in steps_of(of_folder(experts, begun / "data", 2), run)] == [2]


def test_the_listing_may_be_lost(experts: list[Path], begun: Path, tmp_path: Path) -> None:
    """What the data was is in the checkpoint; only the detail of an error is not."""
    run = shutil.copytree(begun / "run", tmp_path / "run")
    (run / "data.safetensors").unlink()
    kept = (begun / "data" / "metadata.jsonl").read_text()
    edit_caption(begun / "data")
    with refusal("AFA-TRAIN-006"):
        list(steps_of(of_folder(experts, begun / "data", 2), run))
    (begun / "data" / "metadata.jsonl").write_text(kept)
    assert [s.step for s in steps_of(of_folder(experts, begun / "data", 2), run)] == [2]
    assert (run / "data.safetensors").is_file()


def as_earlier(run: Path) -> None:
    """A run as releases before `data.background` wrote it: no listing, no hashes."""
    (run / "data.safetensors").unlink(missing_ok=True)
    written = json.loads((run / "recipe.json").read_text())
    del written["data"]["background"]
    (run / "recipe.json").write_text(json.dumps(written))
    for place in (run / "checkpoints").iterdir():
        with safe_open(place, framework="pt") as file:
            notes = json.loads(file.metadata()["afa"])
        del notes["made_from"]
        save_file(load_file(place), place, metadata={"afa": json.dumps(notes)})


def said_by_check(asked: Recipe, run: Path) -> list[str]:
    found = inputs_of_training(asked, run, lambda *_: None)
    return [finding.text for finding in found.findings]


def test_a_run_of_an_earlier_release(experts: list[Path], tmp_path: Path) -> None:
    """Its held-out samples were the last lines, which are not held out any more."""
    folder_of(tmp_path / "data", 5)
    for validates in (True, False):
        run = tmp_path / str(validates)
        asked = of_folder(experts, tmp_path / "data", 1, validates=validates)
        list(steps_of(asked, run))
        as_earlier(run)
        longer = of_folder(experts, tmp_path / "data", 2, validates=validates)
        checked = said_by_check(longer, run)
        if validates:
            with refusal("AFA-TRAIN-026") as e:
                list(steps_of(longer, run))
            assert str(e.value) in checked
        else:
            assert any("stored no hash of the data" in line for line in checked)
            notes = [note for event in train(longer, run) for note in event.notes]
            assert any("stored no hash of the data" in note for note in notes)


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_pictures_that_an_earlier_release_read_otherwise(
    experts: list[Path], tmp_path: Path, kind: str
) -> None:
    data: dict[str, Any] = {"folder": str(tmp_path / "data"), "cache": False}
    if kind == "folder":
        folder_of(tmp_path / "data", 5)
        Image.new("RGBA", (20, 20), (255, 0, 0, 255)).save(tmp_path / "data" / "1.png")
    else:
        rows(tmp_path / "rows.parquet", ["red", "green", "blue"])
        files = {"path": "parquet", "data_files": str(tmp_path / "*.parquet"), "streaming": True}
        data = {"dataset": files, "cache_folder": str(tmp_path / "cache")}
    run = tmp_path / "run"
    list(steps_of(recipe(experts[:1], data, num_steps=1), run))
    as_earlier(run)
    opaque, longer = shutil.copytree(run, tmp_path / "copy"), recipe(experts[:1], data, num_steps=2)
    assert [s.step for s in steps_of(longer, opaque)] == [2]
    if kind == "folder":
        Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(tmp_path / "data" / "1.png")
    else:
        rows(tmp_path / "rows.parquet", ["red", "#00ff0080", "blue"], mode="RGBA")
    with refusal("AFA-TRAIN-025", "earlier release.* 1 transparent") as caught:
        list(steps_of(longer, run))
    assert kind == "stream" or str(caught.value) in said_by_check(longer, run)


def set_key(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(expert: Path) -> None:
        settings = json.loads((expert / file).read_text())
        settings[key] = value
        (expert / file).write_text(json.dumps(settings))

    return change


CONFIGURATIONS = {
    "scheduler": set_key("scheduler/scheduler_config.json", "beta_end", 0.02),
    "vae": set_key("vae/config.json", "scaling_factor", 0.5),
    "unet": set_key("unet/config.json", "act_fn", "gelu"),
    "text_encoder": set_key("text_encoder/config.json", "hidden_act", "gelu"),
    "tokenizer": set_key("tokenizer/tokenizer_config.json", "model_max_length", 12),
}


def test_another_configuration_of_equal_weights_is_refused(
    experts: list[Path], tmp_path: Path
) -> None:
    own = shutil.copytree(experts[0], tmp_path / "own")
    data = {"scenes": {"num_samples": 20}}
    list(steps_of(recipe([own], data, num_steps=1), tmp_path / "run"))
    for part, change in CONFIGURATIONS.items():
        change(own)
        with refusal("AFA-TRAIN-005", f"the configuration of {part}[,.]"):
            list(steps_of(recipe([own], data, num_steps=2), tmp_path / "run"))
        shutil.rmtree(own)
        shutil.copytree(experts[0], own)


def test_train_aggregators_continues_with_the_same_alone(
    experts: list[Path], tmp_path: Path
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    checkpoints = Checkpoints(tmp_path)
    settings = recipe(experts, num_steps=1).training
    list(train_aggregators(pipeline, SceneImages(10), settings, checkpoints=checkpoints))
    longer = settings.model_copy(update={"num_steps": 2})
    changed = settings.model_copy(update={"learning_rate": 0.5})
    for said, data, chosen, transform in (
        ("the data", SceneImages(11), longer, None),
        ("the settings", SceneImages(10), changed, None),
        ("the transform", SceneImages(10), longer, Transform(16, flip=True)),
    ):
        with refusal("AFA-TRAIN-005", f"{said}"):
            train_aggregators(pipeline, data, chosen, checkpoints=checkpoints, transform=transform)
    steps = train_aggregators(pipeline, SceneImages(10), longer, checkpoints=checkpoints)
    assert [step.step for step in steps] == [2]


def rows(place: Path, colours: list[str], files: Path | None = None, mode: str = "RGB") -> None:
    """A parquet file of pictures, or of the paths of pictures."""
    pictures = []
    for n, colour in enumerate(colours):
        buffer = io.BytesIO()
        Image.new(mode, (20, 20), colour).save(buffer, format="PNG")
        entry: dict[str, Any] = {"bytes": buffer.getvalue(), "path": None}
        if files is not None:
            (files / f"{n}.png").write_bytes(buffer.getvalue())
            entry = {"bytes": None, "path": str(files / f"{n}.png")}
        pictures.append(entry)
    table = pyarrow.table({"image": pictures, "text": [f"a {n}" for n in range(len(colours))]})
    pyarrow.parquet.write_table(table, place)


@pytest.mark.parametrize("kind", ["stream", "files"])
def test_rows_of_data_sets(experts: list[Path], tmp_path: Path, kind: str) -> None:
    colours = ["red", "green", "blue", "white", "black"]
    files = tmp_path if kind == "files" else None
    rows(tmp_path / "rows.parquet", colours, files)
    dataset = {
        "path": "parquet",
        "data_files": str(tmp_path / "*.parquet"),
        "streaming": kind == "stream",
    }
    data = {"dataset": dataset, "cache": True, "cache_folder": str(tmp_path / "cache")}
    written = as_written(experts[:1], data, num_steps=1)
    written["validation"] = {"num_samples": 2}
    list(steps_of(Recipe.model_validate(written), tmp_path / "run"))
    written["training"]["num_steps"] = 2
    if files is None:
        rows(tmp_path / "rows.parquet", ["red", "pink", "blue", "white", "black"])
    else:  # the rows stay as they are
        Image.new("RGB", (20, 20), "pink").save(tmp_path / "1.png")
    with refusal("AFA-TRAIN-006", "1"):
        list(steps_of(Recipe.model_validate(written), tmp_path / "run"))
    rows(tmp_path / "rows.parquet", colours, files)
    assert [s.step for s in steps_of(Recipe.model_validate(written), tmp_path / "run")] == [2]
