"""Draw scenes with any pipeline, and score the models of a zoo."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from diffusers import DiffusionPipeline

from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.work import draw
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

GUIDANCE_SCALE = 3.0  # larger values oversaturate the small models of the zoo
NUM_STEPS = 20  # DDIM steps with which the bundled models were scored
_SEED = 0


def draw_pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 32,
) -> list[Image.Image]:
    """Draw one picture per prompt; the noise of prompt i depends only on `seed` and i.

    Args:
        pipeline: a diffusers pipeline, with or without an ensemble.
        prompts: any captions.
        seed: seed of the initial noise.
        num_steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 disables it.
        batch_size: pictures per batch, which does not affect the noise.
    """
    pipeline.set_progress_bar_config(disable=True)
    sampling = SamplingRecipe(guidance=guidance_scale)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        numbers = range(start, start + len(chosen))
        pictures += draw(pipeline, chosen, numbers, seed, num_steps, sampling)
    return pictures


def scores_of(verdicts: Sequence[Verdict]) -> dict[str, Interval]:
    """The fractions of pictures with `both` sides correct and with both `objects`."""
    count = len(verdicts)
    return {
        score: wilson(sum(getattr(verdict, score) for verdict in verdicts) / count, count)
        for score in ("both", "objects")
    }


def grade(
    folders: Mapping[str, Path],
    classifier: ObjectClassifier,
    *,
    num_prompts: int,
) -> Generator[FitStep, None, dict[str, Any]]:
    """Score models on each kind of prompt.

    Args:
        folders: folders of diffusers pipelines, by model.
        classifier: see `afa.zoo.judges.load_classifier`.
        num_prompts: number of prompts of each kind.

    Yields:
        Progress by model and kind of prompt; its "loss" is the fraction of wrong pictures.

    Returns:
        The content of `report.json`.
    """
    kinds = [kind for kind in get_args(Kind) if kind != "any"]
    report: dict[str, dict[str, Any]] = {}
    for n, (name, folder) in enumerate(folders.items()):
        # None avoids diffusers' warning of a missing safety checker
        options = {"safety_checker": None} if (folder / "unet").is_dir() else {}
        pipeline = DiffusionPipeline.from_pretrained(folder, **options)
        report[name] = {}
        for k, kind in enumerate(kinds):
            started = time.perf_counter()
            prompts = evaluation_prompts(num_prompts, kind=kind)
            verdicts = judge(classifier, draw_pictures(pipeline, prompts, seed=_SEED), prompts)
            scores = scores_of(verdicts)
            report[name][kind] = {score: asdict(found) for score, found in scores.items()}
            done, wrong = n * len(kinds) + k + 1, 1 - scores["both"].mean
            seconds = time.perf_counter() - started
            yield FitStep("grades", done, len(folders) * len(kinds), wrong, seconds)
    settings = {
        "num_prompts": num_prompts,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": _SEED,
    }
    return {"settings": settings, "models": report}
