"""Several captions of a picture, repeats, and a folder that is only validated on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import afa
from afa.distilling.recipe import HeldOutRecipe
from afa.loading.vocabulary import read_words
from afa.training import CacheProgress, train
from afa.training.cache import CachedExamples, LatentCache, LatentShards, TextCache
from afa.training.data import CaptionOptions, FolderImages, open_data
from afa.training.data.images import repeated
from afa.training.examples import LiveExamples
from afa.training.order import Purpose, draw_at
from afa.training.recipe import DataRecipe
from afa.training.record import entries_of
from afa.training.run import require_same_recipe
from afa.training.transform import Transform
from tests.refusal import refusal
from tests.training.runs import SMALL, recipe, steps_of

TRANSFORM = Transform(16, num_variants=2)


def folder_of(place: Path, count: int, first: int = 0, repeats: tuple[int, ...] = ()) -> Path:
    """Pictures that differ, with one to three captions beside them."""
    rng = np.random.default_rng(first)
    for n in range(first, first + count):
        folder = place / f"{repeats[n % len(repeats)]}_x" if repeats else place
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        lines = [f"picture{n} way{k}" for k in range(1 + n % 3)]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    return place


def captions_used(examples: Any, places: range, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions of batches of live examples, in order."""
    used: list[str] = []
    from afa.training import examples as module

    original = module.encode_captions

    def noted(pipeline: Any, captions: list[str]) -> Any:
        used.extend(captions)
        return original(pipeline, captions)

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_captions", noted)
        list(examples.batches([places]))
    return used


def test_the_draw_of_a_caption_changes_no_other_number() -> None:
    """The numbers of release 0.1 for this place."""
    draw = draw_at(7, (1, 2, 2), seed=3)
    assert 0 <= draw.text < 1
    assert [draw.one_of("abc")] == ["abc"[int(draw.text * 3)]]
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([3, Purpose.TRAINING, 7]).generate_state(1, np.uint64)[0])
    )
    first = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    assert [draw.variant, draw.caption, draw.time] == first
    torch.randn((2, 1, 2, 2), generator=generator)
    assert len({draw_at(n, (1, 2, 2), seed=3).text for n in range(9)}) == 9


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_captions_are_drawn_alike_with_and_without_a_cache(
    kind: str, experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    place = folder_of(tmp_path / "data", 6)
    asked = DataRecipe(folder=place, captions="random")
    if kind == "dataset":
        files = [place / f"{n}.png" for n in range(6)]
        table = pyarrow.table(
            {
                "image": [file.read_bytes() for file in files],
                "text": [file.with_suffix(".txt").read_text().split("\n") for file in files],
            }
        )
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        named = {"path": "parquet", "data_files": str(tmp_path / "x.parquet")}
        asked = DataRecipe.model_validate({"dataset": named, "captions": "random"})
    data: Any = open_data(asked)
    settings: Any = {"seed": 0, "caption_dropout": 0.2, "device": torch.device("cpu")}
    cache = LatentCache(tmp_path / "cache", pipeline, data, TRANSFORM)
    list(cache.build())
    latents = LatentShards(cache)
    assert len(latents.captions) == 1 + 12  # all of them, and the empty one
    text = TextCache(tmp_path / "cache", pipeline, latents.captions)
    list(text.build())
    purpose = Purpose.TRAINING
    stored = CachedExamples(pipeline, latents, text, TRANSFORM, purpose=purpose, **settings)
    live = LiveExamples(pipeline, data, TRANSFORM, **settings)
    places = [range(0, 20), range(20, 60)]
    for ours, theirs in zip(stored.batches(places), live.batches(places), strict=True):
        for name, tensor in theirs.conditions.items():
            torch.testing.assert_close(ours.conditions[name], tensor, rtol=1e-4, atol=1e-5)
    if kind == "dataset":
        streaming: Any = asked.dataset
        streaming = streaming.model_copy(update={"streaming": True})
        stream: Any = open_data(asked.model_copy(update={"dataset": streaming}))
        cache = LatentCache(tmp_path / "cache", pipeline, stream, TRANSFORM)
        list(cache.build())
        streamed = LatentShards(cache)
        assert [streamed.captions_of(n) for n in range(6)] == list(data.captions())
    used = captions_used(live, range(60), monkeypatch)
    counts = Counter(used)
    assert {"picture2 way0", "picture2 way1", "picture2 way2"} <= counts.keys()
    first = [each for each in counts if each.endswith("way0")]
    assert len(first) == 6
    again = captions_used(
        LiveExamples(pipeline, data, TRANSFORM, **settings), range(60), monkeypatch
    )
    assert again == used


def test_one_caption_is_used_by_default(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 6))
    live = LiveExamples(pipeline, data, TRANSFORM, seed=0)
    assert {each.split()[1] for each in captions_used(live, range(40), monkeypatch)} == {"way0"}
    assert (
        data.fingerprint
        != FolderImages(tmp_path / "data", options=CaptionOptions(several=True)).fingerprint
    )


def test_pictures_are_used_as_often_as_they_are_repeated(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    place = folder_of(tmp_path / "data", 4, repeats=(30, 10))
    data = open_data(DataRecipe(folder=place, repeats=True))
    assert data is not None
    samples = repeated(data, range(4))  # type: ignore[arg-type]
    live = LiveExamples(pipeline, data, TRANSFORM, seed=0, samples=samples)  # type: ignore[arg-type]
    used = Counter(captions_used(live, range(16), monkeypatch))
    assert used == {
        "picture0 way0": 6,
        "picture2 way0": 6,
        "picture1 way0": 2,
        "picture3 way0": 2,
    }


def test_workers_read_a_zip(experts: list[Path], tmp_path: Path) -> None:
    """Forked processes would share the position of an open archive."""
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    place = folder_of(tmp_path / "data", 6)
    archive = Path(shutil.make_archive(str(place), "zip", place))
    options = CaptionOptions(several=True)
    places = [range(n, n + 4) for n in range(0, 16, 4)]
    found = []
    for data, workers in ((FolderImages(place, options=options), 0), (archive, 2)):
        if isinstance(data, Path):
            data = FolderImages(data, options=options)
            _ = data[0]  # opens the archive before the fork
        live = LiveExamples(pipeline, data, TRANSFORM, seed=0, num_workers=workers)
        found.append(list(live.batches(places)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.clean, theirs.clean)
        assert torch.equal(ours.conditions["text"], theirs.conditions["text"])


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    return {"folder": str(place), "cache_folder": str(place.parent / "cache"), **changes}


def losses(asked: Any, output: Path, *, stop_at: int | None = None) -> list[float]:
    """The losses of a run, which is killed before step `stop_at`."""
    found = []
    for step in steps_of(asked, output):
        found.append(step.loss)
        if step.step == stop_at:
            break
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_run_with_all_of_it_resumes_exactly(
    cache: bool, experts: list[Path], tmp_path: Path
) -> None:
    place = folder_of(tmp_path / "data", 6, repeats=(3, 1))
    folder_of(tmp_path / "val", 3, first=20)
    data = settings(place, captions="random", repeats=True, cache=cache, max_broken=0.2)
    asked = recipe(experts[:2], data, num_steps=6)
    validation = {"folder": str(tmp_path / "val"), "num_samples": 9, "every": 3}
    asked = type(asked).model_validate({**asked.model_dump(), "validation": validation})
    whole = losses(asked, tmp_path / "whole")
    assert len(whole) == 6
    losses(asked, tmp_path / "parts", stop_at=3)
    assert losses(asked, tmp_path / "parts")[-3:] == whole[-3:]
    entries = [entries_of(tmp_path / name, "validation_loss") for name in ("whole", "parts")]
    values = [[(each["step"], each["validation_loss"]) for each in found] for found in entries]
    assert values[0] == values[1]
    assert len(values[0]) == 2
    words = set(read_words(tmp_path / "whole") or ())
    assert "picture20" not in words  # validated on, not learnt
    # what changes the steps is refused, and named
    (place / "3_x").rename(place / "4_x")
    with refusal("AFA-TRAIN-005", "the repeats of the pictures"):
        losses(asked, tmp_path / "parts")
    (place / "4_x").rename(place / "3_x")
    (tmp_path / "val" / "20.txt").write_text("another")
    with refusal("AFA-TRAIN-006", "1 sample with changed captions.*20.png"):
        losses(asked, tmp_path / "parts")
    with refusal("AFA-TRAIN-046", "data.captions"):
        require_same_recipe(recipe(experts[:2], {**data, "captions": "first"}), tmp_path / "parts")


@pytest.mark.parametrize("cache", [True, False])
def test_a_picture_in_both_folders_is_refused(
    cache: bool, experts: list[Path], tmp_path: Path
) -> None:
    place = folder_of(tmp_path / "data", 4)
    folder_of(tmp_path / "val", 2, first=20)
    (tmp_path / "val" / "copy.png").write_bytes((place / "1.png").read_bytes())
    (tmp_path / "val" / "copy.txt").write_text("a copy")
    asked = recipe(experts[:2], settings(place, cache=cache))
    changes = {"validation": {"folder": str(tmp_path / "val"), "num_samples": 2}}
    asked = type(asked).model_validate({**asked.model_dump(), **changes})
    with refusal("AFA-TRAIN-071", "1 validation picture of 3 is", r"copy\.png", r"1\.png"):
        list(train(asked, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_summary_and_validation_are_told_before_the_first_step(
    experts: list[Path], tmp_path: Path
) -> None:
    place = folder_of(tmp_path / "data", 4)
    folder_of(tmp_path / "val", 3, first=20)
    asked = recipe(experts[:2], settings(place, resolution=16), num_steps=1)
    validation = {"folder": str(tmp_path / "val"), "num_samples": 2}
    asked = type(asked).model_validate({**asked.model_dump(), "validation": validation})
    events = list(train(asked, tmp_path / "run"))
    notes = [note for each in events if isinstance(each, CacheProgress) for note in each.notes]
    assert f"Pictures: 4 in '{place}', captions beside pictures" in notes
    assert "Sizes: all 24x20; crops of 16x16 cut off 17% on average, 17% at most" in notes
    assert any(note.startswith("Captions: 4, 4 different, the longest of ") for note in notes)
    assert any("Validation uses 2 of 3 pictures" in note for note in notes)


@pytest.mark.parametrize(
    "change",
    [
        {"validation": {"folder": "x", "dataset": {"path": "y"}}},
        {"validation": {"dataset": {"path": "y", "streaming": True}}},
        {
            "data": {"dataset": {"path": "y", "streaming": True}},
            "validation": {"folder": "x"},
        },
    ],
)
def test_validation_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    asked = recipe([Path("a")]).model_dump()
    with pytest.raises(ValidationError):
        afa.training.Recipe.model_validate({**asked, **change})


def test_distillation_holds_out_predictions_only() -> None:
    with pytest.raises(ValidationError, match="predictions"):
        HeldOutRecipe.model_validate({"folder": "x"})


def test_defaults_are_not_written() -> None:
    """Or runs of earlier releases could not be resumed."""
    data = DataRecipe(folder=Path("x")).model_dump(mode="json")
    assert not {"captions", "repeats", "folder_captions", "caption_column"} & data.keys()
    assert json.dumps(data["folder"]) == '"x"'
