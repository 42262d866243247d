"""Held-out pictures: chosen by their content, with all their captions, and never trained on."""

from __future__ import annotations

import json
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afa.training import CacheProgress, Recipe, train
from afa.training.data import FolderImages, SceneImages
from afa.training.examples import Order
from afa.training.listing import Listing, rows_of
from afa.training.order import Purpose
from afa.training.split import Split, split_by_picture
from tests.refusal import refusal
from tests.training.runs import as_written, steps_of

#: a picture and its caption
Line = tuple[str, str]


def folder_of(place: Path, pictures: int, captions: int = 1) -> list[Line]:
    """Pictures in different colours, each with so many captions; writes the list of them."""
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(pictures):
        Image.new("RGB", (16, 16), (9 * n, 200 - 9 * n, 77)).save(place / f"{n}.png")
        lines += [(f"{n}.png", f"caption {k} of {n}") for k in range(captions)]
    write(place, lines)
    return lines


def write(place: Path, lines: list[Line]) -> None:
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in lines]
    (place / "metadata.jsonl").write_text("\n".join(rows))


def listing(data: Any) -> Listing:
    return Listing.of([row for rows in rows_of(data, range(len(data))) for row in rows])


def split(place: Path, num_samples: int) -> Split:
    return split_by_picture(listing(FolderImages(place)), num_samples)


def names(place: Path, samples: list[int]) -> set[str]:
    rows = FolderImages(place).rows
    return {rows[n][0].name for n in samples}


def held_out(place: Path, num_samples: int) -> set[str]:
    """The pictures that are in no training sample."""
    found = split(place, num_samples)
    rest = {path.name for path, _ in FolderImages(place).rows} - names(place, found.training)
    assert names(place, found.validation) <= rest
    return rest


def test_all_captions_of_a_held_out_picture_are_held_out(tmp_path: Path) -> None:
    folder_of(tmp_path, 6, captions=4)
    found = split(tmp_path, 6)
    assert not names(tmp_path, found.training) & names(tmp_path, found.validation)
    assert (len(found.training), len(found.validation), found.num_held_out) == (16, 6, 2)
    assert found.note == (
        "Held out for validation: 2 of 6 different pictures, with all 8 of their captions (24 in "
        "all). The validation loss uses 6 of these."
    )


def test_order_names_and_folder_of_the_list_change_no_split(tmp_path: Path) -> None:
    lines = folder_of(tmp_path / "a", 12, captions=2)
    before = held_out(tmp_path / "a", 5)
    assert len(before) == 3
    assert before != {"9.png", "10.png", "11.png"}, "not the last ones"
    random.Random(0).shuffle(lines)
    write(tmp_path / "a", lines)
    assert held_out(tmp_path / "a", 5) == before
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, _ in lines:
        if (tmp_path / "b" / name).exists():
            (tmp_path / "b" / name).rename(tmp_path / "b" / f"x{name}")
    write(tmp_path / "b", [(f"x{name}", "other words") for name, _ in lines])
    assert held_out(tmp_path / "b", 5) == {f"x{name}" for name in before}


def test_lines_that_are_added_or_removed_move_hardly_any_picture(tmp_path: Path) -> None:
    lines = folder_of(tmp_path, 20)
    before = held_out(tmp_path, 6)
    trained = [line for line in lines if line[0] not in before]
    write(tmp_path, [line for line in lines if line != trained[4]])
    assert held_out(tmp_path, 6) == before
    gone = min(before)
    write(tmp_path, [line for line in lines if line[0] != gone])
    assert before - {gone} < held_out(tmp_path, 6)


def test_the_same_picture_under_two_names_is_one(tmp_path: Path) -> None:
    lines = folder_of(tmp_path, 6)
    for name, _ in list(lines):
        shutil.copy(tmp_path / name, tmp_path / f"again-{name}")
    write(tmp_path, [*lines, *((f"again-{name}", "once more") for name, _ in lines)])
    found = split(tmp_path, 4)
    assert (found.num_pictures, found.num_held_out, len(found.training)) == (6, 2, 8)
    pictures = {name.removeprefix("again-") for name in names(tmp_path, found.training)}
    assert not pictures & {n.removeprefix("again-") for n in names(tmp_path, found.validation)}


@pytest.mark.parametrize(
    ("pictures", "captions", "count", "message"),
    [
        (3, 4, 9, r"\b9 holds out all 3 .*\(12 samples\)"),
        (3, 4, 9, "validation.num_samples to at most 8, or remove"),
        (1, 4, 1, "Add other pictures"),
        (3, 1, 50, "to at most 2"),
    ],
)
def test_no_picture_left_to_train_on(
    tmp_path: Path, pictures: int, captions: int, count: int, message: str
) -> None:
    folder_of(tmp_path, pictures, captions)
    with refusal("AFA-TRAIN-047", message):
        split(tmp_path, count)


def test_scenes_with_the_same_caption_are_one_picture() -> None:
    data = SceneImages(400, kind="food")
    found = split_by_picture(listing(data), 40)
    captions = [data[n][1] for n in range(400)]
    assert found.num_pictures == len(set(captions)) < 400
    assert not {captions[n] for n in found.training} & {captions[n] for n in found.validation}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[Purpose, set[int]]:
    """The samples that are asked for while training, by purpose."""
    found: dict[Purpose, set[int]] = {Purpose.TRAINING: set(), Purpose.VALIDATION: set()}
    candidates = Order.candidates

    def note(self: Order, place: int) -> Any:
        found[self.purpose].add(next(candidates(self, place)))
        return candidates(self, place)

    monkeypatch.setattr(Order, "candidates", note)
    return found


@pytest.mark.parametrize("cache", [False, True])
def test_no_held_out_picture_is_trained_on_before_or_after_a_resume(
    experts: list[Path], tmp_path: Path, seen: dict[Purpose, set[int]], cache: bool
) -> None:
    folder_of(tmp_path / "data", 4, captions=3)
    data = {
        "folder": str(tmp_path / "data"),
        "cache": cache,
        "cache_folder": str(tmp_path / "cache"),
    }
    written = as_written(experts[:1], data, num_steps=9)
    written["validation"] = {"num_samples": 4, "every": 3}
    asked = Recipe.model_validate(written)
    events = list(islice(train(asked, tmp_path / "run"), 8))
    notes = [note for event in events for note in event.notes]
    assert any("Held out for validation: 2 of 4 different pictures, with all 6" in n for n in notes)
    list(steps_of(asked, tmp_path / "run"))
    trained, validated = (names(tmp_path / "data", list(seen[p])) for p in seen)
    assert len(seen[Purpose.TRAINING]) == 6, "all others are"
    assert len(validated) == 2
    assert not trained & validated


def test_a_broken_picture_is_replaced_by_one_of_its_side(
    experts: list[Path], tmp_path: Path, seen: dict[Purpose, set[int]]
) -> None:
    """A held-out picture never stands in for one that is trained on, nor the other way round."""
    folder_of(tmp_path, 6)
    for file in (tmp_path / "1.png", tmp_path / "4.png"):
        file.write_bytes(file.read_bytes()[:60])
    found = split(tmp_path, 3)
    for purpose, samples in (
        (Purpose.TRAINING, found.training),
        (Purpose.VALIDATION, found.validation),
    ):
        order = Order(samples, 0, 0.0, (4, 2, 2), purpose)
        for place in range(3):
            assert set(order.candidates(place)) == set(samples)


def test_a_listing_reads_only_what_somebody_wrote_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, 5, captions=2)
    data = FolderImages(tmp_path)
    first = listing(data)
    first.write(tmp_path)
    kept = Listing.read(tmp_path)
    assert kept is not None
    assert kept.digest == first.digest
    read: list[str] = []

    def hash_file(file: Path) -> str:
        read.append(file.name)
        return "00" * 32

    monkeypatch.setattr("afa.training.listing.hash_file", hash_file)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "3.png")
    rows = [row for rows in rows_of(data, range(10), kept.known()) for row in rows]
    assert set(read) == {"3.png"}
    assert Listing.of(rows).digest != first.digest
    (tmp_path / "data.safetensors").write_bytes(b"nonsense")
    with refusal("AFA-MACHINE-002", "data.safetensors"):
        Listing.read(tmp_path)


def test_progress_of_the_listing_is_told(experts: list[Path], tmp_path: Path) -> None:
    folder_of(tmp_path / "data", 8)
    data = {"folder": str(tmp_path / "data"), "cache": False}
    asked = Recipe.model_validate(as_written(experts[:1], data, num_steps=1))
    first = next(iter(train(asked, tmp_path / "run")))
    assert first == CacheProgress("hash pictures", 8, 8)
