"""The parts of a round that draw: ensembles with all features, comparisons and merges."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

import afa
from afa.app.drawing import Drawn, Progress, Stopped, Studio
from afa.denoisers.kinds import denoiser_of
from afa.drawing.contenders import MERGE
from afa.drawing.pictures import draw, identity_of, prepare, prepare_again
from afa.drawing.plots import filmstrip, heat_map, overlay
from afa.drawing.recorded import (
    PictureRecipe,
    hash_pixels,
    picture_recipe,
    read_picture,
    save_picture,
)
from afa.ensemble.protocol import expert_names
from afa.evaluation import evaluate
from afa.evaluation.recipe import EvaluateRecipe
from afa.merging import MergeRecipe, merge_checkpoints
from afa.zoo.scenes import scene

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from benchmarks.soak.fixtures import Round

ENSEMBLE = "zoo:ensemble"
#: one per round, so that three rounds cover them all
SIZES = ((64, 64), (64, 96), (96, 64))
STEPS = (4, 6, 5)
PRESETS = ("exact", "fast", "balanced")
BIASES: tuple[dict[str, Any], ...] = ({}, {"animals": {"mid": 1.0}}, {"food": {"up": -0.5}})


def asked_for(pipeline: DiffusionPipeline, number: int, **changes: Any) -> PictureRecipe:
    """Return a picture recipe that differs in every round."""
    height, width = SIZES[number % 3]
    fields = {
        "ensemble": ENSEMBLE,
        "identity": identity_of(denoiser_of(pipeline)),
        "prompt": scene(number, kind="mixed").caption,
        "seed": number,
        "steps": STEPS[number % 3],
        "guidance": 3.0,
        "height": height,
        "width": width,
    }
    return picture_recipe(**{**fields, **changes})


def pictures(this: Round) -> None:
    """Draw with a bias and another speed each time, save, and reproduce the saved picture."""
    folder, n = this.new("pictures"), this.number
    preset, bias = PRESETS[n % 3], BIASES[n % 3]
    pipeline = prepare(ENSEMBLE, acceleration=preset, bias=bias)
    denoiser = denoiser_of(pipeline)
    recipe = asked_for(pipeline, n, bias=bias, acceleration=denoiser.acceleration.describe())
    with afa.record_weights(denoiser) as record:
        picture = draw(pipeline, recipe)
    save_picture(picture, folder / "picture.png", recipe, denoiser.device)
    figures(record, picture, denoiser, folder)
    read = read_picture(folder / "picture.png")
    again = draw(prepare_again(read.recipe), read.recipe)
    if hash_pixels(again) != read.pixels:
        raise AssertionError("the same recipe must give the same picture")


def figures(record: Any, picture: Any, denoiser: Any, place: Path) -> None:
    """Draw every figure of a picture's fusion weights."""
    names, sites = expert_names(denoiser), [site.name for site in denoiser.sites]
    filmstrip(record, [picture], place / "film.png", experts=names)
    heat_map(record.mean_share(), place / "heat.svg", experts=names, sites=sites)
    overlay(picture, record.mean_map(None, 64)[-1], place / "over.png", experts=names)


def streamed(this: Round) -> None:
    """Draw with streamed experts, and after loading them back into memory."""
    pipeline = prepare(ENSEMBLE, place="stream")
    draw(pipeline, asked_for(pipeline, this.number))
    lowered = prepare(ENSEMBLE, torch_dtype=torch.bfloat16)
    draw(lowered, asked_for(lowered, this.number, dtype="bfloat16"))


def studio(this: Round) -> None:
    """Draw as the browser app does, in a thread; cancel one picture and abandon another."""
    drawing = Studio(prepare(ENSEMBLE))
    recipe = asked_for(drawing.pipeline, this.number, steps=4)
    by_all = [recipe.model_copy(update={"drawn_by": name}) for name in ("animals", MERGE)]
    by_all.append(recipe)
    drawn = [e for e in drawing.draw(by_all, threading.Event()) if isinstance(e, Drawn)]
    if len(drawn) != len(by_all):
        raise AssertionError("every picture must be drawn")
    stop = threading.Event()
    try:
        for event in drawing.draw([recipe], stop):
            if isinstance(event, Progress):
                stop.set()
    except Stopped:
        pass
    left: Any = drawing.draw([recipe], threading.Event())
    next(left)
    left.close()


def loras(this: Round) -> None:
    """Draw with two LoRA experts on one base, fused by the mean."""
    named = [{"base": "zoo:base", "lora": str(file)} for file in this.fixtures.loras]
    pipeline = afa.load_pipeline(named)
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, asked_for(pipeline, this.number, steps=3))


def families(this: Round) -> None:
    """Draw with tiny ensembles of other families."""
    small = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=2)
    for folders in this.fixtures.experts.values():
        pipeline = afa.load_pipeline(folders, small)
        pipeline.set_progress_bar_config(disable=True)
        asked = {"steps": 2, "height": 16, "width": 16, "prompt": "a fox"}
        draw(pipeline, asked_for(pipeline, this.number, **asked))


def merged(this: Round) -> None:
    """Merge two experts on disk, by another method each round, and draw with the result."""
    written: dict[str, Any] = {"method": "weighted", "experts": ["zoo:animals", "zoo:food"]}
    if this.number % 2:
        written |= {"method": "ties", "base": "zoo:base"}
    output = this.folder / "merged"
    for _ in merge_checkpoints(MergeRecipe.model_validate(written), output):
        pass
    pipeline = afa.load_pipeline([output, "zoo:things"])
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, asked_for(pipeline, this.number, steps=3))


def compared(this: Round) -> None:
    """Run a small evaluation to its report, and again with all results present."""
    recipe = EvaluateRecipe.model_validate(
        {
            "prompts": {"zoo": {"kinds": {"mixed": 2}, "seed": this.number}},
            "methods": [
                {"name": "AFA", "ensemble": ENSEMBLE, "acceleration": "fast"},
                {"name": "expert: food", "model": "zoo:food"},
            ],
            "sampling": {"num_steps": 3, "guidance": 3, "batch_size": 2},
            "metrics": ["scenes", {"name": "clip_t", "weights": "zoo:clip"}],
            "num_resamples": 100,
        }
    )
    for _ in range(2):
        for _ in evaluate(recipe, this.folder / "compared"):
            pass
