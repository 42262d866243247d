"""Buckets against square crops, on emoji scenes that are wide or tall.

    python -m benchmarks.buckets runs/buckets    # resumes

The experts are those of the bundled zoo, which were trained on square scenes. Aggregators are
trained on the same wide and tall scenes: once in buckets, once as random square crops, with the
same steps and batches. Every ensemble then draws unseen pairs of objects in both shapes. The zoo's
classifier judges each half of a picture; its hits on true scenes of that shape are in the result,
because it was trained on square ones. The validation loss is that of whole wide and tall scenes for
every ensemble. The bundled ensemble, which was trained on square scenes, is the reference.

The result goes to `docs/buckets.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from afa.aggregators import SABWSettings
from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.work import draw
from afa.files import read_json, write_atomic
from afa.loading.ensemble_folder import load_ensemble
from afa.loading.expert_source import ExpertSource
from afa.provenance import commit
from afa.statistics import mean_interval, paired_difference
from afa.studies.evaluating import sampling
from afa.studies.jobs import Job, finished, report_progress, run_jobs, train_aggregators_job
from afa.studies.trainings import training
from afa.studies.zoos import SHIPPED
from afa.training.buckets import Buckets
from afa.training.data import FolderImages
from afa.training.data.sizes import parted, sizes_of
from afa.training.examples import LiveExamples
from afa.training.grouping import grouped_by
from afa.training.objective import denoising_loss
from afa.training.order import Purpose
from afa.training.recipe import BucketsRecipe, DataRecipe, Recipe
from afa.training.transform import BucketTransform
from afa.zoo import EXPERTS
from afa.zoo.judges import load_classifier
from afa.zoo.models import AGGREGATOR
from afa.zoo.scenes import BACKGROUNDS, evaluation_prompts, parse_caption, scene
from afa.zoo.sprites import OBJECTS, SPRITE_SIZE, load_sprites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.zoo.scenes import Scene

#: width and height in pixels, which are buckets of the zoo's resolution of 64
SHAPES = {"wide": (88, 40), "tall": (56, 72)}
ARMS: dict[str, BucketsRecipe | None] = {"buckets": BucketsRecipe(), "square crops": None}
BUNDLED = "bundled"
#: of the scenes for training, of those for the validation loss, and of the prompts
DATA_SEED, HELD_OUT_SEED, PROMPT_SEED = 8_100_000, 8_200_000, 8_300_000
#: maximum offsets of an object in `afa.zoo.scenes`
_JITTER = (2, 8)
DOCS = Path(__file__).parents[1] / "docs" / "buckets.json"


def main() -> int:
    """Train, draw and judge, or resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=4000, help="for training")
    parser.add_argument("--prompts", type=int, default=96, help="of each shape")
    parser.add_argument("--held-out", type=int, default=128, help="scenes for the validation loss")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--docs", type=Path, default=DOCS)
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    shown = write_scenes(work / "pictures", asked.pictures, DATA_SEED)
    held_out = write_scenes(work / "held-out", asked.held_out, HELD_OUT_SEED)
    folders = {(arm, seed): work / f"{arm}-{seed}" for arm in ARMS for seed in range(asked.seeds)}
    trainings = [
        Job(
            f"{arm}, seed {seed}",
            train_aggregators_job,
            (recipe_of(shown, arm, seed, asked.steps), folder),
        )
        for (arm, seed), folder in folders.items()
    ]
    run(trainings, asked.processes)
    judged = {key: (str(folder), folder / "judged.json") for key, folder in folders.items()}
    judged[BUNDLED, 0] = "zoo:ensemble", work / "bundled.json"
    jobs = [
        Job(f"judge {arm}, seed {seed}", judge_job, (source, place, held_out, asked.prompts, seed))
        for (arm, seed), (source, place) in judged.items()
    ]
    run(jobs, asked.processes)
    found = {key: read_json(place) for key, (_, place) in judged.items()}
    result = {
        "commit": commit(),
        "shapes": SHAPES,
        "settings": {
            name: getattr(asked, name)
            for name in ("steps", "seeds", "pictures", "prompts", "held_out")
        },
        "judge_on_true_scenes": true_hits(held_out),
        "rows": [row_of(arm, found, folders) for arm in (*ARMS, BUNDLED)],
        "buckets_minus_square_crops": {
            shape: compared(found, shape) for shape in (*SHAPES, "both shapes")
        },
    }
    write_atomic(asked.docs, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result["rows"], indent=1) + "\n")
    return 0


# -- scenes -----------------------------------------------------------------------------------


def write_scenes(folder: Path, count: int, seed: int) -> Path:
    """Write scenes of each shape in turn, with pairs of objects that no test has."""
    listed = folder / "metadata.jsonl"
    if listed.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes, rows = list(SHAPES.values()), []
    for n in range(count):
        shown, name = scene(n, seed=seed), f"{n:06d}.png"
        render(shown, shapes[n % len(shapes)]).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": shown.caption}))
    write_atomic(listed, "\n".join(rows) + "\n")
    return folder


def render(shown: Scene, size: tuple[int, int]) -> Image.Image:
    """Draw a scene on a canvas of this width and height: an object in the middle of each half.

    The offsets are those of the scene, relative to the room that the objects have.
    """
    width, height = size
    colour = np.asarray(BACKGROUNDS[shown.background], dtype=np.float32) / 255.0
    picture = np.broadcast_to(colour, (height, width, 3)).copy()
    room = (width // 2 - SPRITE_SIZE) // 2, (height - SPRITE_SIZE) // 2
    objects = zip((shown.left, shown.right), (0, width // 2), shown.offsets, strict=True)
    for name, start, offset in objects:
        across, down = (
            free + round(free * moved / most)
            for free, moved, most in zip(room, offset, _JITTER, strict=True)
        )
        left = start + across
        window = picture[down : down + SPRITE_SIZE, left : left + SPRITE_SIZE]
        sprite = load_sprites()[name]
        window[:] = window * (1 - sprite[..., 3:]) + sprite[..., :3] * sprite[..., 3:]
    return Image.fromarray(np.round(picture * 255.0).astype(np.uint8))


def are_right(pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[bool]:
    """Whether the classifier finds the right object in both halves of each picture."""
    classifier, found = load_classifier(), []
    for picture, caption in zip(pictures, captions, strict=True):
        array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1.0
        pixels = torch.from_numpy(array).permute(2, 0, 1)
        halves = torch.stack(pixels.split(picture.width // 2, dim=-1))
        truth = parse_caption(caption)
        wanted = [OBJECTS.index(truth.left), OBJECTS.index(truth.right)]
        with torch.no_grad():
            found.append(classifier(halves).argmax(1).tolist() == wanted)
    return found


def true_hits(folder: Path) -> dict[str, float]:
    """The share of true scenes of each shape in which the judge finds both objects."""
    data = FolderImages(folder)
    hits = {}
    for shape, size in SHAPES.items():
        seen = [pair for pair in (data[n] for n in range(len(data))) if pair[0].size == size]
        pictures, captions = zip(*seen, strict=True)
        hits[shape] = sum(are_right(pictures, captions)) / len(seen)
    return hits


# -- trainings --------------------------------------------------------------------------------


def recipe_of(pictures: Path, arm: str, seed: int, num_steps: int) -> Recipe:
    """The recipe of one training; the arms differ in `data.buckets` alone."""
    chosen = {each.name: getattr(AGGREGATOR, each.name) for each in fields(SABWSettings)}
    return Recipe(
        experts=[ExpertSource(SHIPPED.experts[name]) for name in EXPERTS],
        data=DataRecipe(folder=pictures, buckets=ARMS[arm], cache=False),
        aggregator=SABWSettings(**chosen),
        training=training(seed, num_steps),
    )


def run(jobs: list[Job], num_processes: int) -> None:
    """Run jobs, and print their progress."""
    for each in run_jobs(jobs, num_processes):
        if each.done % 50 == 0 or each.done == each.total:
            sys.stderr.write(f"{each.name}: {each.done}/{each.total}\n")


# -- judgement --------------------------------------------------------------------------------


def judge_job(
    name: str, source: str, place: Path, held_out: Path, num_prompts: int, seed: int
) -> None:
    """Draw and judge pictures of an ensemble, and compute its validation loss."""
    if place.exists():
        return
    pipeline = load_ensemble(source)
    pipeline.set_progress_bar_config(disable=True)
    prompts = evaluation_prompts(num_prompts, seed=PROMPT_SEED)
    hits: dict[str, list[bool]] = {}
    for number, (shape, (width, height)) in enumerate(SHAPES.items()):
        asked = SamplingRecipe(**{**sampling(10), "width": width, "height": height})
        hits[shape] = []
        for start in range(0, num_prompts, asked.batch_size):
            texts = prompts[start : start + asked.batch_size]
            places = range(start, start + len(texts))
            drawn = draw(pipeline, texts, places, seed, asked.num_steps, asked)
            hits[shape] += are_right(drawn, texts)
            report_progress(name, number * num_prompts + len(hits[shape]), 2 * num_prompts)
    write_atomic(place, json.dumps({"hits": hits, "loss": losses(pipeline, held_out)}) + "\n")


def losses(pipeline: Any, folder: Path) -> dict[str, float]:
    """The denoising loss of whole scenes of each shape, with fixed noise and timesteps."""
    data, count = FolderImages(folder), len(FolderImages(folder))
    transform = BucketTransform(64, buckets=Buckets(64, 32, 128, 8))
    sizes, _ = parted(pair for chunk in sizes_of(data, range(count)) for pair in chunk)
    grouping = grouped_by(transform, pipeline, sizes, range(count), 16)
    examples = LiveExamples(
        pipeline, data, transform, seed=0, grouping=grouping, purpose=Purpose.VALIDATION
    )
    process = forward_process(pipeline.scheduler)
    predict = conditioning_of(pipeline).predict
    rows, found = examples.rows(count, 16), dict[str, list[float]]()
    names = {size: shape for shape, size in SHAPES.items()}
    for row, batch in zip(rows, examples.batches(rows), strict=True):
        time = torch.tensor([(place + 0.5) / count for place in row], dtype=torch.float64)
        of = partial(predict, pipeline, denoiser_of(pipeline), conditions=batch.conditions)
        with torch.no_grad():
            loss = denoising_loss(of, process, batch.clean, noise=batch.noise, time=time)
        found.setdefault(names[sizes[row[0]]], []).extend(loss.tolist())
    return {shape: float(np.mean(values)) for shape, values in found.items()}


def row_of(arm: str, found: dict[Any, Any], folders: dict[Any, Path]) -> dict[str, Any]:
    """The results of an arm: shares of right pictures, losses, and the time of a step."""
    own = {seed: each for (name, seed), each in found.items() if name == arm}
    steps = [finished(folders[arm, seed]) for seed in own if (arm, seed) in folders]
    return {
        "arm": arm,
        "right": {
            shape: vars(mean_interval(scores_of(own, shape), is_outcome=True))
            for shape in (*SHAPES, "both shapes")
        },
        "validation_loss": {
            shape: [each["loss"][shape] for each in own.values()] for shape in SHAPES
        },
        "seconds_per_step": [step["seconds_per_step"] for step in steps if step is not None],
    }


def scores_of(own: dict[int, Any], shape: str) -> np.ndarray:
    """Hits of one arm [seeds, prompts]; for both shapes, the mean of each prompt's two pictures."""
    of = [[each["hits"][name] for name in SHAPES] for each in own.values()]
    hits = np.asarray(of, dtype=np.float64)
    return hits.mean(1) if shape not in SHAPES else hits[:, list(SHAPES).index(shape)]


def compared(found: dict[Any, Any], shape: str) -> dict[str, Any]:
    """The paired difference of the two trained arms."""
    ours, theirs = (
        scores_of({seed: each for (name, seed), each in found.items() if name == arm}, shape)
        for arm in ARMS
    )
    paired = paired_difference(ours, theirs)
    return {**vars(paired), "difference": vars(paired.difference)}


if __name__ == "__main__":
    sys.exit(main())
