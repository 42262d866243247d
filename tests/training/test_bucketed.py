"""Trainings with buckets: the same steps after any stop, in any division and from a cache."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import afa
from afa.denoisers.kinds import denoiser_of
from afa.distilling.recipe import PicturesRecipe
from afa.loading.task import largest_side
from afa.preflight.inputs import inputs_of_training
from afa.reading.size import stated_size
from afa.training import CacheProgress, Recipe, train, train_aggregators
from afa.training.buckets import Buckets
from afa.training.cache import CachedExamples, LatentCache, LatentShards, TextCache
from afa.training.data import FolderImages, SceneImages, read_picture
from afa.training.data.rows import CaptionOptions
from afa.training.data.sizes import opened_sizes, parted, size_of, sizes_of
from afa.training.examples import LiveExamples
from afa.training.grouping import Grouping, grouped_by
from afa.training.order import Purpose
from afa.training.transform import BucketTransform, Transform
from tests.refusal import refusal
from tests.tiny_pipelines import PIPELINES, saved_experts, tiny_xl
from tests.training.runs import SMALL, as_written, recipe, steps_of
from tests.training.test_processes import figures, finish, last_step, start, write
from tests.training.test_processes import train as train_command

pytestmark = pytest.mark.slow

BUCKETS = Buckets(32, 16, 64, 8)
TRANSFORM = BucketTransform(32, flip=True, num_variants=3, buckets=BUCKETS)
SHAPES = [(60, 24), (40, 40), (24, 60), (50, 36)]  # 48x16, 32x32, 16x48, 40x24
TARGETS = [(48, 16), (32, 32), (16, 48), (40, 24)]


def folder_of(place: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """A folder of pictures of four shapes; some are cut short after their headers."""
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        file = place / f"{n:04d}.jpg"
        picture = Image.new("RGB", SHAPES[n % 4], (7 * n % 256, 11 * n % 256, 200))
        picture.paste((0, 0, 0), (n % 20, 0, n % 20 + 5, 24))
        picture.save(file, quality=95)
        if n in broken:
            file.write_bytes(file.read_bytes()[:640])
        rows.append(json.dumps({"file_name": file.name, "text": f"picture {n % 7}"}))
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return place


def data_of(place: Path, cache: Path | None, **changes: Any) -> dict[str, Any]:
    caching = {"cache": False} if cache is None else {"cache": True, "cache_folder": str(cache)}
    common = {"folder": str(place), "resolution": 32, "buckets": True, "flip": True}
    return {**common, **caching, **changes}


def group(pipeline: Any, data: Any, per_step: int, samples: Any = None) -> Grouping:
    samples = range(len(data)) if samples is None else samples
    pairs = [pair for chunk in sizes_of(data, range(len(data))) for pair in chunk]
    return grouped_by(TRANSFORM, pipeline, parted(pairs)[0], samples, per_step)


# -- sizes and pixels -------------------------------------------------------------------------


def test_sizes_without_decoding_are_those_of_the_pictures(tmp_path: Path) -> None:
    picture, seen = Image.new("RGB", (30, 20), "red"), 0
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tif", "ppm", "ico"):
        for orientation in (None, 1, 3, 6, 8):
            file = tmp_path / f"{orientation}.{suffix}"
            exif, known = Image.Exif(), suffix in ("jpg", "png", "webp", "tif")
            if orientation is not None:
                exif[0x0112] = orientation
            picture.save(file, None, **({"exif": exif} if known else {}))
            size = read_picture(file).size
            for source in (file, file.read_bytes()):
                assert stated_size(source) in (size, None)
            seen += stated_size(file) == (20, 30)
    assert seen == 2 * 3
    late = tmp_path / "late.png"  # the orientation after the pixels
    content = (tmp_path / "6.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    last = content.index(b"IEND") - 4
    late.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert stated_size(late) == read_picture(late).size == (20, 30)


def test_sizes_of_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder_of(tmp_path, 4, broken=(1,))
    (place / "0002.jpg").write_bytes(b"no picture")
    data = FolderImages(place)
    (place / "0003.jpg").unlink()
    os.mkfifo(place / "0003.jpg")
    sizes, broken = parted(pair for chunk in sizes_of(data, range(4)) for pair in chunk)
    assert sizes == {0: (60, 24), 1: (40, 40)}  # the header of a broken picture
    assert sorted(broken) == [2, 3]
    assert "0002.jpg" in broken[2]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of which a warning is an error here
        assert parted(next(sizes_of(data, range(1))))[0] == {0: (60, 24)}
        assert list(opened_sizes(data)) == [(0, (60, 24)), (1, (40, 40))]
        assert size_of(data.stored(0), lambda: data[0]) == (60, 24)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # too large to be read at all
        assert "pixels" in str(size_of(data.stored(0), lambda: data[0]))
    scenes = SceneImages(3)
    assert size_of(scenes.stored(0), lambda: scenes[0]) == (64, 64)


def test_pixels_fill_the_bucket(tmp_path: Path) -> None:
    data = FolderImages(folder_of(tmp_path, 4))
    for n, (width, height) in enumerate(TARGETS):
        assert TRANSFORM(data[n][0], n, 0).shape == (3, height, width)
    levels = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (20, 1))
    ramp = Image.fromarray(levels).convert("RGB")
    pixels = BucketTransform(32, buckets=BUCKETS)(ramp, 0, 0)
    assert pixels.shape == (3, 16, 48)
    assert float(abs(pixels[0, 8, 0] - pixels[0, 8, -1])) > 1.9  # both ends are in it
    mirrored = [TRANSFORM(ramp, n, 0)[0, 8, 0] > 0 for n in range(50)]
    assert 10 < sum(mirrored) < 40


def test_a_square_in_its_square_bucket_is_as_without_buckets(tmp_path: Path) -> None:
    picture = Image.effect_noise((70, 70), 60).convert("RGB")
    plain = Transform(32, flip=True)
    for n in range(5):
        assert torch.equal(TRANSFORM(picture, n, 0), plain(picture, n, 0))
        assert torch.equal(TRANSFORM.sizes((70, 70), n, 0), plain.sizes((70, 70), n, 0))


def test_sizes_of_xl_follow_the_bucket() -> None:
    transform = BucketTransform(32, crop="center", buckets=BUCKETS)
    # scaled to 56 x 17 pixels, of which the lower 16 rows are used
    assert transform.sizes((100, 30), 0, 0).tolist() == [30, 100, 1, 0, 16, 56]
    assert transform.sizes((30, 100), 0, 0).tolist() == [100, 30, 0, 1, 56, 16]
    assert transform.sizes((40, 40), 0, 0).tolist() == [40, 40, 0, 0, 32, 32]


def test_batches_of_xl_have_the_conditions_of_their_pictures(tmp_path: Path) -> None:
    pipeline: Any = tiny_xl(tmp_path / "tokenizer")
    data = FolderImages(folder_of(tmp_path / "data", 12))
    transform = BucketTransform(32, crop="center", buckets=BUCKETS)
    grouping = group(pipeline, data, 2)
    live = LiveExamples(pipeline, data, transform, seed=0, grouping=grouping)
    for row in (range(n, n + 2) for n in range(0, 24, 2)):
        batch = next(live.batches([row]))
        samples = [next(grouping.candidates(place, 0)) for place in row]
        expected = [transform.sizes(SHAPES[n % 4], n, 0) for n in samples]
        assert torch.equal(batch.conditions["sizes"], torch.stack(expected))
        width, height = TARGETS[samples[0] % 4]
        shrink = height // batch.clean.shape[-2]
        assert batch.clean.shape[-2:] == (height // shrink, width // shrink)
        assert batch.noise.shape == batch.clean.shape


# -- cache ------------------------------------------------------------------------------------


def test_cached_batches_are_those_of_the_live_examples(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afa.training.cache.latents.SHARD", 4)
    pipeline = afa.load_pipeline(experts, SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 22, broken=(4, 13)))
    (tmp_path / "data" / "0007.jpg").write_bytes(b"no picture")
    cache = LatentCache(tmp_path / "cache", pipeline, data, TRANSFORM)
    list(cache.build())
    latents = LatentShards(cache)
    text = TextCache(tmp_path / "cache", pipeline, latents.captions)
    list(text.build())
    common: dict[str, Any] = {"seed": 0, "max_broken": 0.5, "samples": range(21)}
    live_grouping = group(pipeline, data, 4, range(21))
    stored_grouping = grouped_by(TRANSFORM, pipeline, latents.known_sizes, range(21), 4)
    assert live_grouping.members == stored_grouping.members
    for purpose in Purpose.TRAINING, Purpose.VALIDATION:
        common["purpose"] = purpose
        stored = CachedExamples(
            pipeline,
            latents,
            text,
            TRANSFORM,
            device=torch.device("cpu"),
            grouping=stored_grouping,
            **common,
        )
        live = LiveExamples(pipeline, data, TRANSFORM, grouping=live_grouping, **common)
        rows: Any = [range(n, n + 4) for n in range(0, 80, 4)]
        if purpose is Purpose.VALIDATION:
            rows = live.rows(21, 4)
            assert rows == stored.rows(21, 4)
            assert sorted(place for row in rows for place in row) == list(range(21))
        shapes = set()
        for ours, theirs in zip(stored.batches(rows), live.batches(rows), strict=True):
            torch.testing.assert_close(ours.clean, theirs.clean, rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.conditions["sizes"], theirs.conditions["sizes"])
            assert torch.equal(ours.noise, theirs.noise)
            assert torch.equal(ours.time, theirs.time)
            shapes.add(ours.clean.shape[-2:])
        assert len(shapes) == 4


def test_one_of_several_captions_is_drawn_alike_with_and_without_a_cache(
    experts: list[Path], tmp_path: Path
) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    place = folder_of(tmp_path / "data", 8)
    rows = [{"file_name": f"{n:04}.jpg", "text": [f"{n} a", f"{n} b", f"{n} c"]} for n in range(8)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = FolderImages(place, options=CaptionOptions(several=True))
    cache = LatentCache(tmp_path / "cache", pipeline, data, TRANSFORM)
    list(cache.build())
    latents = LatentShards(cache)
    text = TextCache(tmp_path / "cache", pipeline, latents.captions)
    list(text.build())
    common: Any = {"seed": 0, "grouping": group(pipeline, data, 4), "device": torch.device("cpu")}
    for purpose in Purpose.TRAINING, Purpose.VALIDATION:
        common["purpose"] = purpose
        live = LiveExamples(pipeline, data, TRANSFORM, **common)
        stored = CachedExamples(pipeline, latents, text, TRANSFORM, **common)
        places: Any = [range(4), range(4, 8)]
        if purpose is Purpose.VALIDATION:
            places = live.rows(8, 4)
        for ours, theirs in zip(stored.batches(places), live.batches(places), strict=True):
            for name, tensor in theirs.conditions.items():
                torch.testing.assert_close(ours.conditions[name], tensor, rtol=1e-4, atol=1e-5)


def test_buckets_have_a_cache_of_their_own(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 4))
    transforms = [
        Transform(32),
        *(BucketTransform(32, buckets=Buckets(32, 16, 64, step)) for step in (8, 16)),
        BucketTransform(32, buckets=Buckets(32, 16, 64, 8, no_upscale=True)),
        BucketTransform(32, buckets=Buckets(32, 8, 64, 8)),
        BucketTransform(32, buckets=Buckets(32, 16, 48, 8)),
    ]
    caches = {LatentCache(tmp_path, pipeline, data, each).folder for each in transforms}
    assert len(caches) == len(transforms)


def test_readers_get_the_buckets(experts: list[Path], tmp_path: Path) -> None:
    """Where processes are spawned, their order of samples is pickled."""
    data = FolderImages(folder_of(tmp_path / "data", 8))
    grouping = group(afa.load_pipeline(experts[:1], SMALL), data, 4)
    again = pickle.loads(pickle.dumps((grouping, TRANSFORM)))
    for place in range(40):
        ours, theirs = (next(each.candidates(place, 0)) for each in (grouping, again[0]))
        assert ours == theirs
    assert again[1] == TRANSFORM


def test_a_run_is_the_same_with_a_cache_and_workers(experts: list[Path], tmp_path: Path) -> None:
    place = folder_of(tmp_path / "data", 25, broken=(6,))
    losses = []
    for cache, workers in ((None, 0), (None, 2), (tmp_path / "cache", 0)):
        data = data_of(place, cache, num_workers=workers, max_broken=0.1)
        asked = as_written(experts, data, num_steps=12, checkpoint_every=20)
        asked["validation"] = {"num_samples": 6, "every": 4}
        output = tmp_path / f"{cache} {workers}".replace("/", "")
        events = list(train(Recipe.model_validate(asked), output))
        notes = [note for event in events for note in event.notes]
        assert sum("0006.jpg" in note for note in notes) == 1, notes
        assert sum(note.startswith("Buckets: ") for note in notes) == 1
        assert not any("Square crops" in note for note in notes)
        found = [event.loss for event in events if not isinstance(event, CacheProgress)]
        losses.append([*found, *figures(output, "validation_loss")])
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_a_stream_has_buckets_too(experts: list[Path], tmp_path: Path) -> None:
    place = folder_of(tmp_path / "data", 9, broken=(3,))
    pictures = [(place / f"{n:04d}.jpg").read_bytes() for n in range(9)]
    table = pyarrow.table({"image": pictures, "text": list("abcdefghi")})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    losses = []
    for streaming in (True, False):
        rows = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
        data = data_of(place, tmp_path / "cache", max_broken=0.2)
        del data["folder"]
        data["dataset"] = {**rows, "streaming": streaming}
        run = steps_of(recipe(experts, data, num_steps=8), tmp_path / f"run {streaming}")
        losses.append([step.loss for step in run])
    assert losses[0] == losses[1]


# -- the same steps ---------------------------------------------------------------------------


def test_stopped_and_continued_in_another_division(experts: list[Path], tmp_path: Path) -> None:
    """With another batch size and without the cache, which may change when a run is resumed."""
    place = folder_of(tmp_path / "data", 14)

    def asked(size: int, count: int, cache: bool = True) -> Recipe:
        data = data_of(place, tmp_path / "cache" if cache else None)
        return recipe(
            experts, data, num_steps=8, batch_size=size, gradient_accumulation_steps=count
        )

    whole = list(steps_of(asked(4, 1), tmp_path / "whole"))
    first = list(islice(steps_of(asked(4, 1), tmp_path / "parts"), 3))  # as if interrupted
    rest = list(steps_of(asked(4, 1), tmp_path / "parts"))
    assert [s.loss for s in first + rest] == [s.loss for s in whole]
    outputs = [tmp_path / name / "aggregators.safetensors" for name in ("whole", "parts")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    first = list(islice(steps_of(asked(4, 1), tmp_path / "other"), 3))
    rest = list(steps_of(asked(2, 2, cache=False), tmp_path / "other"))
    losses = [s.loss for s in first + rest]
    assert losses == pytest.approx([s.loss for s in whole], rel=1e-3)


def test_accumulated_batches_are_one_large_batch(experts: list[Path], tmp_path: Path) -> None:
    """The loss is the mean over the samples, whatever the shape of their pictures."""
    place = folder_of(tmp_path / "data", 14)
    losses = []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        settings: dict[str, Any] = {"batch_size": size, "gradient_accumulation_steps": count}
        asked = recipe(experts, data_of(place, None), num_steps=6, **settings)
        losses.append([step.loss for step in steps_of(asked, tmp_path / f"run {size}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.processes
def test_two_processes_are_one_with_twice_the_batch(experts: list[Path], tmp_path: Path) -> None:
    losses, validation, weights = [], [], []
    place = folder_of(tmp_path / "data", 20, broken=(2,))
    for name, num_processes, size in (("one", 1, 4), ("two", 2, 2)):
        for cache in (None, tmp_path / f"cache {name}"):
            data = data_of(place, cache, max_broken=0.2)
            asked = as_written(experts, data, num_steps=8, batch_size=size, log_every=1)
            asked["validation"] = {"num_samples": 7, "every": 4}
            output = tmp_path / f"{name} {cache is None}"
            train_command(write(tmp_path, asked, f"{output.name}.yaml"), output, num_processes)
            losses.append(figures(output, "loss"))
            validation.append(figures(output, "validation_loss"))
            weights.append(load_file(output / "aggregators.safetensors"))
    assert len(losses[0]) == 8
    for other in range(1, 4):
        assert losses[other] == pytest.approx(losses[0], rel=1e-3)
        assert validation[other] == pytest.approx(validation[0], rel=1e-3)
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[2][key], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.processes
def test_killed_it_ends_with_the_same_bytes(experts: list[Path], tmp_path: Path) -> None:
    place = folder_of(tmp_path / "data", 14)
    changes: dict[str, Any] = {"num_steps": 20, "checkpoint_every": 2, "log_every": 1}
    for name, moments in (("whole", ()), ("parts", (3, 11))):
        data = data_of(place, tmp_path / f"cache {name}")
        path, output = write(tmp_path, as_written(experts, data, **changes)), tmp_path / name
        for moment in moments:
            process = start(path, output)
            deadline = time.monotonic() + 300
            while last_step(output) < moment:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert not (output / "aggregators.safetensors").exists()
        finish(start(path, output))
    whole, parts = (tmp_path / n / "aggregators.safetensors" for n in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


def test_resuming_with_other_buckets_is_refused(experts: list[Path], tmp_path: Path) -> None:
    place, output = folder_of(tmp_path / "data", 8), tmp_path / "run"
    list(steps_of(recipe(experts, data_of(place, None), num_steps=2), output))
    for buckets in (False, {"step": 16}):
        asked = recipe(experts, data_of(place, None, buckets=buckets), num_steps=4)
        with refusal("AFA-TRAIN-046", "data.buckets"):
            list(steps_of(asked, output))


# -- every kind, and other trainings ----------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind not in ("dit", "refiner")])
def test_every_kind_is_trained_in_buckets(kind: str, tmp_path: Path) -> None:
    folders = saved_experts(kind, tmp_path / "experts", count=2)
    place = folder_of(tmp_path / "data", 8)
    losses = []
    for cache in (None, tmp_path / "cache"):
        data = data_of(place, cache, buckets={"step": 16})
        run = steps_of(recipe(folders, data, num_steps=6), tmp_path / f"run {cache is None}")
        losses.append([step.loss for step in run])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_position_embeddings_limit_the_sides(tmp_path: Path) -> None:
    folders = saved_experts("sd3", tmp_path / "experts", count=2)
    pipeline: Any = afa.load_pipeline(folders, SMALL)
    config = denoiser_of(pipeline).config
    side = config.pos_embed_max_size * config.patch_size * pipeline.vae_scale_factor
    assert largest_side(pipeline) == side
    place = folder_of(tmp_path / "data", 8)
    asked = recipe(folders, data_of(place, None, buckets={"max_size": 2 * side}))
    with refusal("AFA-TRAIN-083", str(side)):
        list(steps_of(asked, tmp_path / "run"))
    asked = recipe(folders, data_of(place, None, buckets=False, resolution=2 * side))
    with refusal("AFA-TRAIN-083", str(side)):
        list(steps_of(asked, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_saves_memory_changes_nothing(experts: list[Path], tmp_path: Path) -> None:
    place, losses = folder_of(tmp_path / "data", 8), []
    for switch in (None, "gradient_checkpointing", "offload_experts"):
        changes: dict[str, Any] = {} if switch is None else {switch: True}
        asked = recipe(experts, data_of(place, None), num_steps=6, **changes)
        losses.append([step.loss for step in steps_of(asked, tmp_path / f"run {switch}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_with_other_settings(experts: list[Path], tmp_path: Path) -> None:
    place = folder_of(tmp_path / "data", 8)
    settings: dict[str, Any] = {
        "prompt_noise": 0.5,
        "min_snr_gamma": 5.0,
        "entropy_weight": 0.1,
        "balance_weight": 0.1,
        "ema_decay": 0.9,
        "expert_dtype": "bfloat16",
    }
    other = shutil.copytree(experts[1], tmp_path / "other")  # predictions need one latent space
    shutil.rmtree(other / "vae")
    shutil.copytree(experts[0] / "vae", other / "vae")
    for fuse in ("blocks", "predictions"):
        used = [experts[0], other]
        data = data_of(place, None, buckets={"no_upscale": fuse == "predictions"})
        asked = as_written(used, data, num_steps=6, **settings)
        if fuse == "predictions":
            asked |= {"fuse": fuse, "aggregator": {**asked["aggregator"], "min_scale": 1}}
        asked["previews"] = {"prompts": ["a fox"], "every": 6, "num_steps": 1}
        steps = list(steps_of(Recipe.model_validate(asked), tmp_path / fuse))
        assert len(steps) == 6
        assert afa.load_ensemble(tmp_path / fuse)


def test_check_says_what_training_says(experts: list[Path], tmp_path: Path) -> None:
    place, said = folder_of(tmp_path / "data", 8), {}
    for buckets in (True, False):
        data = data_of(place, None, buckets=buckets)
        asked = as_written(experts, data, num_steps=2)
        asked["validation"] = {"num_samples": 2, "every": 2}
        found = inputs_of_training(Recipe.model_validate(asked), None, lambda *_: None)
        said[buckets] = {finding.text: finding.level for finding in found.findings}
        events = train(Recipe.model_validate(asked), tmp_path / f"run {buckets}")
        notes = [note for event in events for note in event.notes]
        for first in ("Buckets: ", "warning: No step of", "warning: Square crops"):
            lines = [note for note in notes if note.startswith(first)]
            assert len(lines) == (buckets != first.startswith("warning: Square"))
            for line in lines:
                level = "warning" if line.startswith("warning: ") else "note"
                assert said[buckets][line.removeprefix("warning: ")] == level
    (line,) = [text for text in said[False] if text.startswith("Square crops")]
    assert "cut off 37% of the pictures' area on average; 6 of 8 pictures" in line


def test_train_aggregators_takes_buckets(experts: list[Path], tmp_path: Path) -> None:
    data = FolderImages(folder_of(tmp_path / "data", 8))
    settings = recipe(experts, num_steps=6).training
    pipeline = afa.load_pipeline(experts, SMALL)
    steps = list(train_aggregators(pipeline, data, settings, transform=TRANSFORM))
    assert len(steps) == 6


def test_a_distillation_refuses_them() -> None:
    data = {"folder": "pictures", "buckets": True}
    with pytest.raises(ValueError, match=r"must not have data\.buckets"):
        PicturesRecipe.model_validate({"data": data, "number": 4})
    PicturesRecipe.model_validate({"data": {**data, "buckets": False}, "number": 4})


def test_a_picture_that_changes_meanwhile_is_named(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    data = FolderImages(folder_of(tmp_path / "data", 4))
    live = LiveExamples(pipeline, data, TRANSFORM, seed=0, grouping=group(pipeline, data, 4))
    buffer = io.BytesIO()
    Image.new("RGB", (24, 60)).save(buffer, format="JPEG")
    (tmp_path / "data" / "0000.jpg").write_bytes(buffer.getvalue())
    with refusal("AFA-TRAIN-084", "0000.jpg", "16x48", "48x16"):
        list(live.batches([range(n, n + 4) for n in range(0, 16, 4)]))


def test_scenes_and_drawn_pictures_are_of_the_square_bucket(
    experts: list[Path], tmp_path: Path
) -> None:
    """The same steps as without buckets, but in another order of the samples."""
    data = {"scenes": {"num_samples": 6}, "resolution": 16, "buckets": True, "cache": False}
    events = list(train(recipe(experts, data), tmp_path / "run"))
    notes = [note for event in events for note in event.notes]
    assert any("Buckets: 6 of 16x16" in note for note in notes)


def test_repeats_and_a_folder_for_validation(experts: list[Path], tmp_path: Path) -> None:
    for n, shape in enumerate(SHAPES):
        place = tmp_path / "data" / f"{1 + 2 * (n % 2)}_fox"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", shape, (60 * n, 0, 0)).save(place / f"{n}.jpg")
        (place / f"{n}.txt").write_text("a fox")
    validated = folder_of(tmp_path / "validated", 5, broken=(1,))
    losses = []
    for cache in (None, tmp_path / "cache"):
        data = data_of(tmp_path / "data", cache, repeats=True, max_broken=0.5)
        asked = as_written(experts, data, num_steps=12)
        asked["validation"] = {"folder": str(validated), "num_samples": 5, "every": 6}
        output = tmp_path / f"run {cache is None}"
        events = list(train(Recipe.model_validate(asked), output))
        notes = [note for event in events for note in event.notes]
        (line,) = [note for note in notes if note.startswith("Buckets: ")]
        assert line.startswith("Buckets: 3 of 32x32, 3 of 36x28, 1 of 20x48, 1 of 48x20;")
        found = [event.loss for event in events if not isinstance(event, CacheProgress)]
        losses.append([*found, *figures(output, "validation_loss")])
    assert len(losses[0]) == 12 + 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
