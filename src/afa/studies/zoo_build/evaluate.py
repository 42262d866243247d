"""Draw and judge scenes with any pipeline: same prompts and same noise for everyone."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from diffusers import DiffusionPipeline

from afa.denoisers.kinds import kind_of_pipeline
from afa.statistics import Interval, wilson
from afa.studies.zoo_build.fit import FitStep
from afa.zoo.judges import judge
from afa.zoo.scenes import Kind, evaluation_prompts

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from afa.zoo.judges import Verdict
    from afa.zoo.models import ObjectClassifier

GUIDANCE_SCALE = 3.0  # the zoo's models are small: more of it burns the colours
NUM_STEPS = 20  # DDIM steps at which the shipped models were judged


@dataclass(frozen=True)
class Score:
    """How well pictures show what their prompts say.

    `both`: the right object on the right side, twice. `objects`: both are there, in any order.
    `left`, `right`: the right object on that side. `seconds_per_image`: wall time of the drawing.
    """

    both: Interval
    objects: Interval
    left: Interval
    right: Interval
    seconds_per_image: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], seconds: float) -> Score:
        """Sum up the verdicts on pictures that took `seconds` in all."""
        shares = {
            name: proportion([getattr(verdict, name) for verdict in verdicts])
            for name in ("both", "objects", "left", "right")
        }
        return cls(**shares, seconds_per_image=seconds / len(verdicts))


def proportion(outcomes: Sequence[bool]) -> Interval:
    """The share of true outcomes, with its 95 % interval."""
    return wilson(sum(outcomes) / len(outcomes), len(outcomes))


def draw_pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 32,
) -> list[Image.Image]:
    """One picture per prompt; the noise of prompt i depends on `seed` and i alone.

    Args:
        pipeline: a stock pipeline, with or without an ensemble inside.
        prompts: any captions.
        seed: of the initial noise.
        num_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 switches it off.
        batch_size: pictures at a time; changes nothing in them.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + start + n) for n in range(len(chosen))
        ]
        pictures += pipeline(
            chosen,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            **kind_of_pipeline(pipeline).call,
        ).images
    return pictures


def evaluate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    classifier: ObjectClassifier,
    *,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> tuple[Score, list[Image.Image]]:
    """Draw a picture per prompt and judge them all.

    Args:
        pipeline: see `draw_pictures`, like all but the following.
        prompts: captions of scenes.
        classifier: from `afa.zoo.judges.load_classifier`.
        seed: see `draw_pictures`.
        num_steps: see `draw_pictures`.
        guidance_scale: see `draw_pictures`.
    """
    started = time.perf_counter()
    pictures = draw_pictures(
        pipeline, prompts, seed=seed, num_steps=num_steps, guidance_scale=guidance_scale
    )
    seconds = time.perf_counter() - started
    return Score.of(judge(classifier, pictures, prompts), seconds), pictures


def grade(
    folders: Mapping[str, Path],
    classifier: ObjectClassifier,
    *,
    num_prompts: int,
    seed: int = 0,
) -> Generator[FitStep, None, dict[str, Any]]:
    """Judge models, each on every kind of prompt.

    Args:
        folders: of stock pipelines, by the models' names.
        classifier: see `evaluate`.
        num_prompts: of each kind.
        seed: see `draw_pictures`.

    Yields: progress by model and kind of prompt; its "loss" is the share of wrong pictures.

    Returns: the report, as `report.json` has it.
    """
    kinds = [kind for kind in get_args(Kind) if kind != "any"]
    report: dict[str, dict[str, Any]] = {}
    for n, (name, folder) in enumerate(folders.items()):
        # what ships without a safety checker would be warned of
        options = {"safety_checker": None} if (folder / "unet").is_dir() else {}
        pipeline = DiffusionPipeline.from_pretrained(folder, **options)
        report[name] = {}
        for k, kind in enumerate(kinds):
            started = time.perf_counter()
            prompts = evaluation_prompts(num_prompts, kind=kind)
            score, _ = evaluate(pipeline, prompts, classifier, seed=seed)
            report[name][kind] = {"both": asdict(score.both), "objects": asdict(score.objects)}
            done, wrong = n * len(kinds) + k + 1, 1 - score.both.mean
            seconds = time.perf_counter() - started
            yield FitStep("grades", done, len(folders) * len(kinds), wrong, seconds)
    settings = {
        "num_prompts": num_prompts,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": seed,
    }
    return {"settings": settings, "models": report}
