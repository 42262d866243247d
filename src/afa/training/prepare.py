"""The examples of a training, encoded beforehand where that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.pipeline import native_resolution, size_multiple
from afa.training.cache import (
    CachedExamples,
    CacheProgress,
    LatentCache,
    LatentShards,
    TextCache,
    default_cache_folder,
)
from afa.training.data import StreamedImages
from afa.training.examples import LiveExamples
from afa.training.order import Purpose
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Generator

    from diffusers import DiffusionPipeline

    from afa.training.data import CaptionedImages
    from afa.training.engine import Engine
    from afa.training.examples import Examples
    from afa.training.recipe import DataRecipe, Recipe

    #: examples for training, and for validation where there is any
    Prepared = tuple[Examples, Examples | None]


def prepare_examples(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    engine: Engine,
) -> Generator[CacheProgress, None, Prepared]:
    """Examples for training and for validation, encoded beforehand where that pays."""
    settings, asked = recipe.training, recipe.data
    transform = Transform(
        asked.resolution or min(native_resolution(pipeline)),
        asked.crop,
        asked.flip,
        asked.num_variants,
        settings.seed,
    )
    factor = size_multiple(pipeline)
    if transform.resolution % factor:
        raise AfaError(
            f"data.resolution must be a multiple of {factor}, in which the experts work, came "
            f"{transform.resolution}."
        )
    num_held_out = 0 if recipe.validation is None else recipe.validation.num_samples
    common: Any = {"seed": settings.seed, "max_broken": asked.max_broken, "device": engine.device}
    if not _is_cached(asked, data, settings.num_steps * engine.shares(settings).total):
        assert not isinstance(data, StreamedImages), "a stream is always cached"
        used, held_out = _split(len(data), num_held_out)
        live: Any = {**common, "num_workers": asked.num_workers}
        training = LiveExamples(
            pipeline,
            data,
            transform,
            samples=used,
            caption_dropout=settings.caption_dropout,
            **live,
        )
        if not held_out:
            return training, None
        return training, LiveExamples(
            pipeline, data, transform, samples=held_out, purpose=Purpose.VALIDATION, **live
        )
    folder = asked.cache_folder or default_cache_folder()
    cache = LatentCache(folder, pipeline, data, transform)
    yield from cache.build(engine.rank, engine.num_processes, asked.max_broken)
    engine.wait()
    latents = LatentShards(cache)
    text = TextCache(folder, pipeline, latents.captions)
    yield from text.build(engine.rank, engine.num_processes)
    engine.wait()
    used, held_out = _split(latents.num_samples, num_held_out)
    cached = CachedExamples(
        pipeline,
        latents,
        text,
        transform,
        samples=used,
        caption_dropout=settings.caption_dropout,
        purpose=Purpose.TRAINING,
        **common,
    )
    if not held_out:
        return cached, None
    return cached, CachedExamples(
        pipeline, latents, text, transform, samples=held_out, purpose=Purpose.VALIDATION, **common
    )


def _is_cached(asked: DataRecipe, data: CaptionedImages | StreamedImages, num_places: int) -> bool:
    """As asked; by default where the training goes over the data more than once."""
    if isinstance(data, StreamedImages):
        return True
    return num_places > len(data) if asked.cache is None else asked.cache


def _split(num_samples: int, num_held_out: int) -> tuple[range, range]:
    """The samples to train on, and the last ones, which are held out.

    Raises:
        AfaError: none would be left to train on.
    """
    if num_held_out >= num_samples:
        raise AfaError(
            f"validation.num_samples must be less than the {num_samples} samples there are, came "
            f"{num_held_out}."
        )
    return range(num_samples - num_held_out), range(num_samples - num_held_out, num_samples)
