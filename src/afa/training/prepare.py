"""Prepare the examples of a training: cached if each is used several times, or made when needed."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError
from afa.loading.task import largest_side, native_resolution, size_multiple
from afa.loading.truncation import limits_of, warnings_for
from afa.loading.vocabulary import coverage_warnings, files_of, words_of
from afa.reading import BrokenSample, Tally, conversions_of
from afa.training.buckets import buckets_of, crop_lines, require_side
from afa.training.cache import (
    CachedExamples,
    CacheProgress,
    LatentCache,
    LatentShards,
    TextCache,
    default_cache_folder,
)
from afa.training.continuing import digest
from afa.training.data import StreamedImages
from afa.training.data.sizes import parted, rough_sizes, sizes_of
from afa.training.data.survey import caption_warnings, folder_warnings, known_captions
from afa.training.examples import LiveExamples
from afa.training.grouping import grouped_by
from afa.training.listing import Listing, digest_of, is_settled, rows_of, settled_parts
from afa.training.order import Purpose
from afa.training.split import split_by_picture
from afa.training.transform import BucketTransform, Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from diffusers import DiffusionPipeline

    from afa.training.began import Began
    from afa.training.buckets import Size
    from afa.training.data import CaptionedImages
    from afa.training.engine import Engine
    from afa.training.examples import Examples
    from afa.training.recipe import DataRecipe, Recipe

    Samples = tuple[Sequence[int], Sequence[int]]


class Prepared(NamedTuple):
    """Examples and what is known of the data.

    Attributes:
        training: examples for training.
        validation: examples for validation; None without it.
        listing: of the data; None if its settings determine it.
        words: of the captions; empty if they are not known in advance.
    """

    training: Examples
    validation: Examples | None
    listing: Listing | None
    words: list[str]


def prepare_examples(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    engine: Engine,
    began: Began | None = None,
) -> Generator[CacheProgress, None, Prepared]:
    """Prepare examples for training and validation, and encode them in advance if that saves time.

    Args:
        recipe: of the training.
        pipeline: with the autoencoder and text encoders.
        data: pictures and captions.
        engine: the processes.
        began: what the run began with; None without an output folder.

    Raises:
        AfaError: if the data differs from what the run began with, there are too few pictures for
            validation, the resolution does not fit, or the cache raises it.
    """
    settings, asked = recipe.training, recipe.data
    native, multiple = min(native_resolution(pipeline)), size_multiple(pipeline)
    transform = transform_of(recipe, native, multiple, largest_side(pipeline))
    common: Any = {"seed": settings.seed, "max_broken": asked.max_broken, "device": engine.device}
    listing, content, words = None, None, list[str]()
    make: Callable[..., Examples]
    if not isinstance(data, StreamedImages):
        if not is_settled(data) or recipe.validation is not None:
            listing = yield from _list_samples(data, engine, began)
        # the listing of scenes has no positions of objects
        if listing is None or is_settled(data):
            content = digest_of(data)
        else:
            settled = settled_parts(data)
            content = digest([listing.digest, settled]) if settled else listing.digest
        yield from _require_data(began, content, listing, data)
    per_step = engine.shares(settings).total
    num_places = settings.num_steps * per_step
    sizes: dict[int, Size] = {}
    if not isinstance(data, StreamedImages) and not _is_cached(asked, len(data), num_places):
        used, held_out = yield from _split(recipe, listing, len(data), transform, began)
        words = words_of(known_captions(data))
        live: Any = {**common, "num_workers": asked.num_workers, "tally": Tally()}
        if isinstance(transform, BucketTransform):
            sizes, live["broken"] = yield from _read_sizes(data, engine)
        if engine.is_main:
            shown = sizes.values() or (() if is_settled(data) else rough_sizes(data))
            lines = _crops(transform, shown)
            yield from _say(recipe, pipeline, data, known_captions(data, num_places), lines)
        make = partial(LiveExamples, pipeline, data, transform, **live)
    else:
        folder = asked.cache_folder or default_cache_folder()
        cache = LatentCache(folder, pipeline, data, transform, content)
        yield from cache.build(engine.rank, engine.num_processes, asked.max_broken)
        engine.wait()
        latents = LatentShards(cache)
        if isinstance(data, StreamedImages):
            listing = latents.listing
            yield from _require_data(began, listing.digest, listing, None, latents.tally)
        text = TextCache(folder, pipeline, latents.captions)
        yield from text.build(engine.rank, engine.num_processes)
        engine.wait()
        words = words_of(latents.all_captions)
        sizes = latents.known_sizes
        if engine.is_main:
            lines = [*latents.tally.lines(), *_crops(transform, sizes.values())]
            yield from _say(recipe, pipeline, data, latents.all_captions, lines)
        used, held_out = yield from _split(recipe, listing, latents.num_samples, transform, began)
        make = partial(CachedExamples, pipeline, latents, text, transform, **common)
    of_training: dict[str, Any] = {"caption_dropout": settings.caption_dropout}
    of_validation: dict[str, Any] = {}
    if isinstance(transform, BucketTransform):
        grouping = grouped_by(transform, pipeline, sizes, used, per_step)
        of_training["grouping"] = grouping
        if engine.is_main:
            warnings = grouping.warnings(settings.num_steps, settings.seed)
            notes = grouping.summary(transform, sizes), *(f"warning: {each}" for each in warnings)
            yield CacheProgress("group pictures", 1, 1, notes)
        if held_out:
            of_held_out = grouped_by(transform, pipeline, sizes, held_out, per_step)
            of_validation["grouping"] = of_held_out
    training = make(samples=used, purpose=Purpose.TRAINING, **of_training)
    validation = None
    if held_out:
        validation = make(samples=held_out, purpose=Purpose.VALIDATION, **of_validation)
    return Prepared(training, validation, listing, words)


def transform_of(recipe: Recipe, native: int, multiple: int, largest: int | None) -> Transform:
    """Return the crops and flips of a training.

    Args:
        recipe: of the training.
        native: the experts' resolution in pixels.
        multiple: see `afa.loading.task.size_multiple`.
        largest: see `afa.loading.task.largest_side`.

    Raises:
        AfaError: if the resolution or the buckets do not fit the experts.
    """
    data, seed = recipe.data, recipe.training.seed
    side = data.resolution or native
    require_resolution(side, multiple)
    require_side(side, largest)
    settings = side, data.crop, data.flip, data.num_variants, seed
    if data.buckets is None:
        return Transform(*settings)
    return BucketTransform(*settings, buckets=buckets_of(data.buckets, side, multiple, largest))


def _read_sizes(
    data: CaptionedImages, engine: Engine
) -> Generator[CacheProgress, None, tuple[dict[int, Size], dict[int, str]]]:
    """Read the sizes of all pictures, of which each process reads a part.

    Returns: the sizes, and the error messages of pictures without a readable one.
    """
    mine = engine.part(len(data))
    found: list[tuple[int, Size | str]] = []
    for some in sizes_of(data, mine):
        found += some
        yield CacheProgress("read sizes of pictures", len(found), len(mine))
    found = engine.gather(found)
    sizes, broken = parted(found)
    if broken:
        notes = tuple(f"Skipped: {line}" for line in broken.values())
        yield CacheProgress("read sizes of pictures", len(mine), len(mine), notes)
    return sizes, broken


def _crops(transform: Transform, sizes: Iterable[Size]) -> list[str]:
    """A warning if square crops cut off a part of the pictures."""
    return [] if isinstance(transform, BucketTransform) else crop_lines(sizes)


def require_resolution(side: int, multiple: int) -> None:
    """Refuse a resolution in pixels that is not a multiple of what the experts support.

    Raises:
        AfaError: if it is not.
    """
    if side % multiple:
        raise AfaError(
            "AFA-TRAIN-042",
            f"data.resolution must be a multiple of {multiple} for these experts; got {side}.",
        )


def _list_samples(
    data: CaptionedImages, engine: Engine, began: Began | None
) -> Generator[CacheProgress, None, Listing]:
    """Hash all pictures and captions; each process hashes a part.

    Files in the run's earlier listing are read only if they have changed.
    """
    known = began.listing.known() if began is not None and began.listing is not None else None
    mine = engine.part(len(data))
    rows = []
    for some in rows_of(data, mine, known):
        rows += some
        yield CacheProgress("hash pictures", len(rows), len(mine))
    return Listing.of(engine.gather(rows))


def _require_data(
    began: Began | None,
    content: str,
    listing: Listing | None,
    names: CaptionedImages | None,
    tally: Tally | None = None,
) -> Generator[CacheProgress, None, None]:
    """Refuse to resume with different data; `tally` counts conversions of pictures already read."""
    if began is None:
        return
    if tally is None:
        tally = Tally()
        if began.is_earlier and names is not None and not is_settled(names):
            yield from _read_all(names, tally)
    if notes := began.require_data(content, listing, names, tally):
        yield CacheProgress("compare pictures", 1, 1, tuple(notes))


def _read_all(data: CaptionedImages, tally: Tally) -> Iterator[CacheProgress]:
    """Read all pictures to count conversions; broken ones are reported later."""
    for index in range(len(data)):
        with suppress(BrokenSample):
            tally.add(index, conversions_of(data[index][0]))
        yield CacheProgress("read pictures", index + 1, len(data))


def _split(
    recipe: Recipe,
    listing: Listing | None,
    num_samples: int,
    transform: Transform,
    began: Began | None,
) -> Generator[CacheProgress, None, Samples]:
    """Return the samples to train on and the held-out samples."""
    used: Sequence[int] = range(num_samples)
    held_out: Sequence[int] = ()
    note = None
    if recipe.validation is not None:
        assert listing is not None, "the split is by the hashes in it"
        split = split_by_picture(listing, recipe.validation.num_samples)
        used, held_out, note = split.training, split.validation, split.note
    if began is not None:
        began.require_split(held_out, transform)
    if note is not None:
        yield CacheProgress("hold out pictures", num_samples, num_samples, (note,))
    return used, held_out


def _say(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    captions: Sequence[str | None],
    more: Sequence[str] = (),
) -> Iterator[CacheProgress]:
    """Yield warnings about data and prompts before the first step."""
    lines = [*folder_warnings(data), *caption_warnings(captions, limits_of(pipeline)), *more]
    if captions:
        lines += coverage_warnings(files_of(recipe.experts), captions)
    previews = recipe.previews
    if previews is not None:
        cut = warnings_for(
            pipeline,
            previews.prompts,
            guidance=previews.guidance,
            syntax=previews.prompt_syntax,
        )
        lines += [f"previews: {line}" for line in cut]
    if lines:
        yield CacheProgress("check the data", 1, 1, tuple(f"warning: {each}" for each in lines))


def _is_cached(asked: DataRecipe, num_samples: int, num_places: int) -> bool:
    """Whether to cache: `data.cache`, by default if samples are used more than once."""
    return num_places > num_samples if asked.cache is None else asked.cache
