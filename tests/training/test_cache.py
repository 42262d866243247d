"""Encoded once: the same batches as without, anew where something changed, whole after any stop."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import afa
from afa.denoisers.kinds import options_of
from afa.training import CacheProgress, train
from afa.training.cache import CachedExamples, LatentCache, LatentShards, TextCache
from afa.training.data import FolderImages, SceneImages
from afa.training.examples import LiveExamples
from afa.training.order import Purpose
from afa.training.transform import Transform
from afa.zoo.sprites import load_sprites
from tests.refusal import refusal
from tests.tiny_pipelines import tiny_xl
from tests.training.runs import SMALL, recipe, steps_of

pytestmark = pytest.mark.slow

TRANSFORM = Transform(16, flip=True, num_variants=3)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("latents", "text"):
        monkeypatch.setattr(f"afa.training.cache.{module}.SHARD", 4)
        monkeypatch.setattr(f"afa.training.cache.{module}.BATCH", 3)


def folder_of(place: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """A folder of wide pictures in different colours; some are cut short."""
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        file = place / f"{n:04d}.png"
        picture = Image.new("RGB", (40, 24), (7 * n % 256, 11 * n % 256, 200))
        picture.paste((0, 0, 0), (n % 30, 0, n % 30 + 5, 24))
        picture.save(file)
        if n in broken:
            file.write_bytes(file.read_bytes()[:60])
        rows.append(json.dumps({"file_name": file.name, "text": f"picture {n % 7}"}))
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return place


def cached(pipeline: Any, data: Any, folder: Path, **changes: Any) -> CachedExamples:
    cache = LatentCache(folder, pipeline, data, TRANSFORM)
    list(cache.build())
    latents = LatentShards(cache)
    text = TextCache(folder, pipeline, latents.captions)
    list(text.build())
    settings: dict[str, Any] = {"seed": 0, "device": torch.device("cpu")} | changes
    settings.setdefault("purpose", Purpose.TRAINING)
    return CachedExamples(pipeline, latents, text, TRANSFORM, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_batches_are_those_of_the_live_examples(
    experts: list[Path], tmp_path: Path, dtype: torch.dtype, num_experts: int
) -> None:
    pipeline = afa.load_pipeline(experts[:num_experts], SMALL, torch_dtype=dtype)
    data = FolderImages(folder_of(tmp_path / "data", 10, broken=(4,)))
    changes: Any = {"caption_dropout": 0.3, "max_broken": 0.5, "samples": range(9)}
    places = [range(n, n + 3) for n in range(0, 30, 3)]
    stored = cached(pipeline, data, tmp_path / "cache", **changes)
    live = LiveExamples(pipeline, data, TRANSFORM, seed=0, **changes)
    for ours, theirs in zip(stored.batches(places), live.batches(places), strict=True):
        # encoded beside other pictures, so the last bits may differ
        loose = dtype == torch.bfloat16
        tolerance: Any = {"rtol": 0.05, "atol": 0.05} if loose else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours.clean, theirs.clean, **tolerance)
        assert ours.conditions.keys() == theirs.conditions.keys() == {"text", "sizes"}
        text, expected = ours.conditions["text"], theirs.conditions["text"]
        torch.testing.assert_close(text, expected, **tolerance)
        assert torch.equal(ours.conditions["sizes"], theirs.conditions["sizes"])
        assert torch.equal(ours.noise, theirs.noise)
        assert torch.equal(ours.time, theirs.time)
        assert text.dtype == expected.dtype == dtype
    assert stored.broken.found.keys() == live.broken.found.keys() == {4}


def test_files_are_let_go_of_with_whoever_reads_them(experts: list[Path], tmp_path: Path) -> None:
    """Or what is removed would still take its place on the disk, in a process that goes on."""
    data = {"scenes": {"num_samples": 9}, "cache": True, "cache_folder": str(tmp_path / "cache")}
    list(steps_of(recipe(experts, data), tmp_path / "run"))
    gc.collect()
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert str(tmp_path / "cache") not in Path("/proc/self/maps").read_text()


def test_nothing_is_lost_by_reading_rows(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    stored = cached(pipeline, SceneImages(9), tmp_path / "cache")

    def epoch() -> int:
        for _ in stored.batches([range(n, n + 3) for n in range(0, 9, 3)]):
            pass
        gc.collect()
        return sys.getallocatedblocks()

    gc.collect()
    gc.freeze()  # or every collection would look through all objects of the session
    try:
        epoch()
        before = epoch()
        after = [epoch() for _ in range(20)][-1]
    finally:
        gc.unfreeze()
    # a library that loses two numbers whenever it reads a tensor would make it a thousand
    assert after - before < 400


def test_variants_that_are_alike_are_encoded_once(experts: list[Path], tmp_path: Path) -> None:
    """The scenes are square: every crop of one is the whole."""
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    sizes = {}
    for transform in (Transform(16, num_variants=3), Transform(16, flip=True, num_variants=3)):
        cache = LatentCache(tmp_path, pipeline, SceneImages(5), transform)
        list(cache.build())
        sizes[transform.flip] = [len(load_file(place)["mean"]) for place in cache.shards()]
    assert sizes == {False: [4, 1], True: [12, 3]}


def test_a_stopped_pass_goes_on_and_a_finished_one_does_nothing(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 10))
    whole = LatentCache(tmp_path / "whole", pipeline, data, TRANSFORM)
    list(whole.build())
    parts = LatentCache(tmp_path / "parts", pipeline, data, TRANSFORM)
    assert list(islice(parts.build(), 2))[-1] == CacheProgress("encode pictures", 8, 10)
    first = {place: place.stat().st_mtime_ns for place in parts.shards()}
    list(parts.build())
    assert all(place.stat().st_mtime_ns == when for place, when in first.items())
    for one, other in zip(whole.shards(), parts.shards(), strict=True):
        assert one.read_bytes() == other.read_bytes()

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be encoded")

    monkeypatch.setattr("afa.training.cache.latents.encode_pictures", refuse)
    assert list(parts.build())[-1].done == 10


def test_two_processes_make_what_one_makes(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 10))
    alone = LatentCache(tmp_path / "alone", pipeline, data, TRANSFORM)
    list(alone.build())
    shared = LatentCache(tmp_path / "shared", pipeline, data, TRANSFORM)
    for rank in range(2):
        list(shared.build(rank, 2))
    assert [p.read_bytes() for p in alone.shards()] == [p.read_bytes() for p in shared.shards()]


def test_each_thing_that_matters_has_its_own_cache(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    place = folder_of(tmp_path / "data", 5)

    def name(transform: Transform = TRANSFORM, pipeline: Any = pipeline) -> str:
        return LatentCache(tmp_path, pipeline, FolderImages(place), transform).folder.name

    first = name()
    assert name() == first
    names = {
        first,
        name(Transform(16, num_variants=3)),
        name(Transform(16, flip=True, num_variants=3, seed=1)),
    }
    names.add(name(pipeline=afa.load_pipeline(experts[1:], SMALL)))  # another autoencoder
    names.add(name(pipeline=afa.load_pipeline(experts, SMALL, torch_dtype=torch.bfloat16)))
    Image.new("RGB", (50, 50)).save(place / "0002.png")
    names.add(name())
    assert len(names) == 6


def test_a_changed_expert_has_its_text_encoded_again_and_no_others(
    experts: list[Path], tmp_path: Path
) -> None:
    captions = ["", *(f"a {n}" for n in range(9))]
    folder = tmp_path / "cache"
    pipeline = afa.load_pipeline(experts, SMALL)
    text = TextCache(folder, pipeline, captions)
    list(text.build())
    whole = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    torch.testing.assert_close(text.conditions(captions)["text"], whole, rtol=1e-4, atol=1e-5)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(list(folder.iterdir())) == 3

    changed = tmp_path / "changed"
    shutil.copytree(experts[1], changed)
    (file,) = (changed / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    key = next(key for key in tensors if "final_layer_norm.weight" in key)
    tensors[key] = tensors[key] * 2
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    other = afa.load_pipeline([experts[0], changed, experts[2]], SMALL)
    text = TextCache(folder, other, captions)
    list(text.build())
    assert len(list(folder.iterdir())) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    whole = other.encode_prompt(captions, "cpu", 1, False)[0]
    torch.testing.assert_close(text.conditions(captions)["text"], whole, rtol=1e-4, atol=1e-5)


def test_experts_with_one_text_encoder_have_one_embedding(
    experts: list[Path], tmp_path: Path
) -> None:
    pipeline = afa.load_pipeline([experts[0]] * 2, SMALL, allow_duplicates=True)
    text = TextCache(tmp_path, pipeline, ["", "a fox"])
    list(text.build())
    expected = pipeline.encode_prompt(["a fox"], "cpu", 1, False)[0]
    assert text.conditions(["a fox"])["text"].shape == expected.shape


def test_a_damaged_shard_is_named(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    cache = LatentCache(tmp_path, pipeline, SceneImages(5), TRANSFORM)
    list(cache.build())
    place = cache.shards()[0]
    place.write_bytes(place.read_bytes()[:100])
    with refusal("AFA-MACHINE-002", "000000.safetensors"):
        list(cache.build())


def test_no_room_on_the_disk_is_said_before_any_work(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("afa.training.cache.latents.shutil.disk_usage", lambda _: usage)
    cache = LatentCache(tmp_path, pipeline, SceneImages(5), TRANSFORM)
    with refusal("AFA-TRAIN-001", "0.0", "--no-cache"):
        next(cache.build())
    assert not cache.shards()


def test_a_stream_is_read_once_into_the_cache(experts: list[Path], tmp_path: Path) -> None:
    def picture(n: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (10 * n, 0, 0)).save(buffer, format="PNG")
        return buffer.getvalue()[: 50 if n == 3 else None]

    table = pyarrow.table({"image": [picture(n) for n in range(9)], "text": list("abcdefghi")})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    data: Any = {
        "dataset": {
            "path": "parquet",
            "data_files": str(tmp_path / "rows.parquet"),
            "streaming": True,
        },
        "cache_folder": str(tmp_path / "cache"),
        "max_broken": 0.2,
    }
    events = list(train(recipe(experts, data), tmp_path / "streamed"))
    progress = [event for event in events if isinstance(event, CacheProgress)]
    assert [event.total for event in progress if event.stage == "encode pictures"] == [None] * 3
    assert any("row 3" in note for event in progress for note in event.notes)
    # the rows at once make another data set with the same pictures, hence the same steps
    data["dataset"] = {**data["dataset"], "streaming": False}
    data["cache"] = True
    steps = [s.loss for s in steps_of(recipe(experts, data), tmp_path / "rows")]
    assert steps == [e.loss for e in events if not isinstance(e, CacheProgress)]


def test_whether_it_is_cached(experts: list[Path], tmp_path: Path) -> None:
    """By default where the data is gone over more than once; 4 steps of 2 samples here."""
    for count, cache, expected in (
        (7, None, True),
        (8, None, False),
        (8, True, True),
        (7, False, False),
    ):
        data = {
            "scenes": {"num_samples": count},
            "cache": cache,
            "cache_folder": str(tmp_path / f"{count} {cache}"),
        }
        list(train(recipe(experts[:1], data), tmp_path / f"run {count} {cache}"))
        assert (tmp_path / f"{count} {cache}").exists() == expected


def test_broken_pictures_are_skipped_and_named_with_or_without_cache(
    experts: list[Path], tmp_path: Path
) -> None:
    place = folder_of(tmp_path / "data", 20, broken=(3, 11))
    losses = []
    for cache in (True, False):
        data = {
            "folder": str(place),
            "cache": cache,
            "cache_folder": str(tmp_path / "cache"),
            "max_broken": 0.1,
        }
        asked = recipe(experts, data, num_steps=20, checkpoint_every=50)
        events = list(train(asked, tmp_path / f"run {cache}"))
        notes = [note for event in events for note in event.notes]
        assert sum("0003.png" in note for note in notes) == 1
        assert sum("0011.png" in note for note in notes) == 1
        losses.append([e.loss for e in events if not isinstance(e, CacheProgress)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_too_many_broken_pictures_stop_it(experts: list[Path], tmp_path: Path) -> None:
    place = folder_of(tmp_path / "data", 20, broken=(3, 11))
    for cache in (True, False):
        data = {"folder": str(place), "cache": cache, "cache_folder": str(tmp_path / "cache")}
        with refusal("AFA-TRAIN-031", r"1\.0%", r"\.png") as stop:
            list(train(recipe(experts, data, num_steps=20), tmp_path / f"run {cache}"))
        assert "\n" not in str(stop.value)


# -- keys -------------------------------------------------------------------------------------


def test_a_picture_of_the_same_name_size_and_time_is_encoded_again(
    experts: list[Path], tmp_path: Path
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    place = folder_of(tmp_path / "data", 5)

    def name() -> str:
        return LatentCache(tmp_path, pipeline, FolderImages(place), TRANSFORM).folder.name

    file = place / "0002.png"
    before, first = file.stat(), name()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert name() != first


def test_latents_depend_on_the_autoencoders_configuration_and_the_releases(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)

    def name() -> str:
        return LatentCache(tmp_path, pipeline, SceneImages(5), TRANSFORM).folder.name

    names = [name()]
    pipeline.vae.register_to_config(act_fn="gelu")
    names.append(name())
    monkeypatch.setattr("afa.training.cache.latents.releases", lambda *_: {"torch": "99.0"})
    names.append(name())
    assert len(set(names)) == 3


def test_scenes_of_other_sprites_are_other_data() -> None:
    sprites = load_sprites()
    first = next(iter(sprites))
    other = {**sprites, first: sprites[first] * 0.5}
    fingerprints = {SceneImages(5).fingerprint, SceneImages(5, sprites=sprites).fingerprint}
    assert len(fingerprints) == 1
    assert SceneImages(5, sprites=other).fingerprint not in fingerprints


def test_texts_depend_on_configurations_padding_and_options(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)

    def made() -> set[str]:
        list(TextCache(tmp_path, pipeline, ["", "a fox"]).build())
        return {path.name for path in tmp_path.iterdir()}

    count = len(made())
    assert len(made()) == count, "a tokenizer that was used is the same"

    def padded() -> None:
        pipeline.tokenizer.pad_token = "!"

    def other_side() -> None:
        pipeline.tokenizer.truncation_side = "left"

    def activation() -> None:
        pipeline.text_encoder.encoders[0].config.hidden_act = "gelu"

    def option() -> None:
        told = options_of(pipeline) | {"force_zeros_for_empty_prompt": True}
        monkeypatch.setattr("afa.training.cache.text.options_of", lambda _: told)

    def release() -> None:
        monkeypatch.setattr("afa.training.cache.text.releases", lambda *_: {"torch": "99.0"})

    for change in (padded, other_side, activation, option, release):
        change()
        count += 1
        assert len(made()) == count, change.__name__


def test_options_of_a_pipeline_are_all_that_are_no_parts(tmp_path: Path) -> None:
    """An empty caption is zeros or not by an option of Stable Diffusion XL."""
    told = options_of(tiny_xl(tmp_path))
    assert told["class"] == "StableDiffusionXLPipeline"
    assert "force_zeros_for_empty_prompt" in told
    assert "unet" not in told
