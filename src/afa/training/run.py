"""A training run from a recipe to an ensemble folder."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from afa.aggregators import SABWConfig
from afa.denoisers.kinds import denoiser_of
from afa.drafting.own import keep_drafts
from afa.errors import AfaError
from afa.files import is_unused, read_json, require_place_for_folder, write_atomic
from afa.loading.ensemble_folder import save_ensemble
from afa.loading.pipeline import load_pipeline
from afa.loading.planned import companions_of
from afa.loading.scheduler_choice import require_scheduler
from afa.loading.vocabulary import words_of
from afa.machine.ownership import owned
from afa.training.began import Began
from afa.training.cache import default_cache_folder
from afa.training.changing import (
    History,
    changes_between,
    require_changeable,
    require_run,
    said_of,
)
from afa.training.checkpoints import Checkpoints, newest_step
from afa.training.continuing import RECIPE
from afa.training.data import Joined, StreamedImages, open_data, open_validation
from afa.training.data.survey import each_text, known_captions
from afa.training.drawn import draw_pictures
from afa.training.earlier import is_earlier
from afa.training.engine import Engine
from afa.training.exported import CHECKPOINTS, write_description
from afa.training.loop import TrainStep, seeded
from afa.training.planned import plan_of_training
from afa.training.prepare import prepare_examples
from afa.training.record import require_trackers
from afa.training.stopping import Stopped
from afa.training.trained import Aggregators
from afa.training.trainer import Trainer
from afa.training.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.drafting.settings import OwnDrafts
    from afa.training.cache import CacheProgress
    from afa.training.data import CaptionedImages
    from afa.training.prepare import Prepared
    from afa.training.recipe import Recipe


def train(
    recipe: Recipe,
    output: Path,
    *,
    should_stop: Callable[[], bool] | None = None,
    continue_with: bool = False,
) -> Iterator[TrainStep | CacheProgress]:
    """Train the aggregators of a recipe and write an ensemble folder (AFA, section 4.1).

    Writes `recipe.json`, `environment.json`, checkpoints and `metrics.jsonl` during the training,
    and the ensemble at the end. The same call resumes an interrupted run; `training.num_steps` may
    be raised meanwhile if the learning rate is constant. Several processes share the samples of a
    step; see `Engine`. With `training.early_stopping`, the ensemble has the weights with the lowest
    validation loss.

    Args:
        recipe: experts, data, aggregator, training.
        output: a new folder, or the folder of an earlier run of this recipe.
        should_stop: called after each step; if it returns True, the run saves and raises `Stopped`.
        continue_with: continue an earlier run with other settings from its newest checkpoint on;
            see `afa.training.changing.CHANGEABLE`.

    Raises:
        AfaError: before anything is written, if the folder contains something else or a part of the
            recipe cannot be loaded; later, as `train_aggregators`.
        Stopped: if `should_stop` returned True.
    """
    settings = recipe.training
    engine = Engine(settings.device)
    history = require_same_recipe(recipe, output, continue_with=continue_with)
    require_trackers(settings.trackers)
    if recipe.previews is not None:
        require_scheduler(plan_of_training(recipe), recipe.previews.scheduler)
    place = recipe.data.cache_folder or default_cache_folder()
    require_place_for_folder(place, "The cache")
    engine.wait()  # so that all processes have checked the folders before one writes
    data = open_data(recipe.data)
    validated = open_validation(recipe)
    require_words(recipe, data)
    with seeded(settings.seed):
        pipeline = load_pipeline(
            recipe.experts,
            SABWConfig(**vars(recipe.aggregator)),
            vae=recipe.vae,
            config=recipe.config,
            parts=recipe.parts,
            allow_duplicates=recipe.allow_duplicates,
            fuse=recipe.fuse,
            torch_dtype=getattr(torch, settings.expert_dtype),
            # offloaded or sharded experts move to the device in parts
            device="cpu" if settings.offload_experts or engine.is_sharding else engine.device,
        )
    if recipe.drafts is not None:
        companions = replace(companions_of(recipe, denoiser_of(pipeline).dtype), own_vae=True)
        keep_drafts(pipeline, recipe.drafts, companions)
    checkpoints = Checkpoints(output / CHECKPOINTS, settings.keep_checkpoints)
    aggregators = Aggregators(pipeline, engine.device)
    trainer = Trainer(pipeline, aggregators, settings, engine, checkpoints)
    began = Began(
        output,
        trainer.began if trainer.first else None,
        validates=recipe.validation is not None,
        bind=trainer.bind,
    )
    training, validation, listing, words, num_validation = yield from _stoppable(
        _prepared(recipe, pipeline, data, validated, engine, began), trainer, should_stop
    )
    if words:
        ensemble = denoiser_of(pipeline)
        ensemble.provenance = replace(ensemble.provenance, words=tuple(words))
    _require_words(recipe.drafts, words)
    with owned(output) if engine.is_main else nullcontext():
        if engine.is_main:
            history.write(output)
            settings_json = recipe.model_dump(mode="json")
            write_atomic(output / RECIPE, json.dumps(settings_json, indent=2) + "\n")
            write_description(aggregators, output)
            if listing is not None:
                listing.write(output)
        watched = _watched(recipe, num_validation)
        with Watch(watched, output, trainer, validation, history) as watch:
            watch.skipped(training.broken)
            yield from watch.steps(training, should_stop)
        trainer.finish()
        if engine.is_main:
            save_ensemble(pipeline, output, exist_ok=True, training=watch.summary)
        engine.wait()


def require_words(recipe: Recipe, data: CaptionedImages | StreamedImages | None) -> None:
    """Check before any work that a data set whose captions are known has words.

    Raises:
        AfaError: see AFA-TRAIN-061.
    """
    if data is None or recipe.data.prompts is not None:
        return
    captions = each_text(known_captions(data))
    if captions:
        _require_words(recipe.drafts, words_of(captions))


def _require_words(drafts: OwnDrafts | None, words: Sequence[str]) -> None:
    """Check that drafts that depend on words can tell which words are known.

    Raises:
        AfaError: if no words of the captions are known.
    """
    if drafts is not None and drafts.needs_words and not words:
        raise AfaError(
            "AFA-TRAIN-061",
            "The drafts depend on the words of the training captions, but these are not known: "
            "they have no spaces between words. Set drafts.prompts: all and drafts.aggregators: "
            "ignore, or remove drafts.",
        )


def _prepared(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages | None,
    validated: CaptionedImages | None,
    engine: Engine,
    began: Began,
) -> Generator[CacheProgress, None, Prepared]:
    """Draw the pictures of prompts, and prepare all examples."""
    if recipe.data.prompts is not None:
        drawn = yield from draw_pictures(recipe, pipeline, engine)
        assert not isinstance(data, StreamedImages), "the recipe refuses it"
        data = drawn if data is None else Joined(data, drawn)
    assert data is not None, "a recipe has pictures or prompts"
    return (yield from prepare_examples(recipe, pipeline, data, engine, began, validated))


def _watched(recipe: Recipe, num_validation: int) -> Recipe:
    """The recipe with the number of validation samples that there are."""
    asked = recipe.validation
    if asked is None or num_validation >= asked.num_samples:
        return recipe
    validation = asked.model_copy(update={"num_samples": num_validation})
    return recipe.model_copy(update={"validation": validation})


def _stoppable(
    encoding: Generator[CacheProgress, None, Prepared],
    trainer: Trainer,
    should_stop: Callable[[], bool] | None,
) -> Generator[CacheProgress, None, Prepared]:
    """Encode until `should_stop` returns True; finished shards are on disk."""
    while True:
        try:
            yield next(encoding)
        except StopIteration as stop:
            return stop.value
        if should_stop is not None and should_stop():
            raise Stopped(trainer.first, trainer.settings.num_steps)


def require_same_recipe(recipe: Recipe, output: Path, *, continue_with: bool = False) -> History:
    """Check that a folder is new, or of an earlier run of this recipe.

    Args:
        recipe: of this start.
        output: the folder.
        continue_with: whether settings may be changed on purpose; see `train`.

    Returns: the recipes of the run, with this one.

    Raises:
        AfaError: if it is not; names the differing settings with both values.
    """
    now, written = recipe.model_dump(mode="json"), output / RECIPE
    if continue_with:
        require_run(written)
    before = read_json(written) if written.is_file() and not is_unused(output) else None
    if before is not None and is_earlier(before):  # the pictures are compared instead
        data = before.get("data") or {}
        before = {**before, "data": {**data, "background": now["data"]["background"]}}
    changes = [] if before is None else changes_between(before, now)
    if continue_with:
        require_changeable(changes, output)
    elif changes or (before is None and not is_unused(output)):
        found = "is not empty and has no run"
        if changes:
            found = f"has a run with another {said_of(changes)}"
        raise AfaError(
            "AFA-TRAIN-046",
            f"The output folder '{output}' {found}. Pass a new folder, or one of an earlier run of "
            "this recipe.",
        )
    return History.of(output, before, now, newest_step(output / CHECKPOINTS))
