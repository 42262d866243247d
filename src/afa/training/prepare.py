"""Prepare the examples of a training: cached if each is used several times, or made when needed."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import islice
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
from afa.training.data import Joined, StreamedImages
from afa.training.data.images import repeated
from afa.training.data.sizes import opened_sizes, parted, sizes_of
from afa.training.data.summary import summarise
from afa.training.data.survey import (
    caption_warnings,
    each_text,
    folder_warnings,
    known_captions,
)
from afa.training.examples import LiveExamples
from afa.training.grouping import grouped_by
from afa.training.listing import Listing, content_of, is_settled, rows_of
from afa.training.order import Purpose
from afa.training.split import split_for
from afa.training.transform import BucketTransform, Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from diffusers import DiffusionPipeline

    from afa.training.began import Began
    from afa.training.buckets import Size
    from afa.training.data import CaptionedImages
    from afa.training.data.summary import DataSummary
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
        num_validation: number of samples for validation.
    """

    training: Examples
    validation: Examples | None
    listing: Listing | None
    words: list[str]
    num_validation: int


def prepare_examples(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    engine: Engine,
    began: Began | None = None,
    validated: CaptionedImages | None = None,
) -> Generator[CacheProgress, None, Prepared]:
    """Prepare examples for training and validation, and encode them in advance if that saves time.

    Args:
        recipe: of the training.
        pipeline: with the autoencoder and text encoders.
        data: pictures and captions.
        engine: the processes.
        began: what the run began with; None without an output folder.
        validated: pictures that are only validated on; None holds out some of the data.

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
    trained, num_trained = data, None if isinstance(data, StreamedImages) else len(data)
    if validated is not None:
        assert not isinstance(data, StreamedImages), "the recipe refuses it"
        data = Joined(data, validated)
    if not isinstance(data, StreamedImages):
        if not is_settled(data) or recipe.validation is not None:
            listing = yield from _list_samples(data, engine, began)
        content = content_of(data, listing)
        yield from _require_data(began, content, listing, data)
    per_step = engine.shares(settings).total
    num_places = settings.num_steps * per_step
    sizes: dict[int, Size] = {}
    if not isinstance(data, StreamedImages) and not _is_cached(
        asked, num_trained or len(data), num_places
    ):
        used, held_out = yield from _split(recipe, listing, data, len(data), transform, began)
        captions = dict(enumerate(known_captions(trained)))
        words = words_of(each_text(captions.values()))
        live: Any = {**common, "num_workers": asked.num_workers, "tally": Tally()}
        if isinstance(transform, BucketTransform):
            sizes, live["broken"] = yield from _read_sizes(data, engine)
        if engine.is_main:
            shown = {n: size for n, size in sizes.items() if n < len(captions)}
            if not isinstance(transform, BucketTransform):
                shown = yield from _opened(trained)
            summary = partial(summarise, sizes=shown, captions=captions)
            yield from _say(recipe, pipeline, trained, transform, listing, summary, num_places)
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
        samples = [n for n in latents.samples if num_trained is None or n < num_trained]
        captions = {n: latents.captions_of(n) for n in samples}
        words = words_of(each_text(captions.values()))
        sizes = latents.known_sizes
        if engine.is_main:
            # shards of earlier releases do not know how pictures look
            is_known = all(n in latents.looks for n in samples)
            looks = {n: latents.looks[n] for n in samples} if is_known else None
            shown = {n: latents.size(n) for n in samples}
            summary = partial(summarise, sizes=shown, captions=captions, looks=looks)
            converted = latents.tally.lines()
            yield from _say(recipe, pipeline, trained, transform, listing, summary, None, converted)
        names = None if isinstance(data, StreamedImages) else data
        used, held_out = yield from _split(
            recipe, listing, names, latents.num_samples, transform, began
        )
        make = partial(CachedExamples, pipeline, latents, text, transform, **common)
    if not isinstance(data, StreamedImages):
        used = repeated(data, used)
        if began is not None and asked.repeats:
            began.require_repeats(used)
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
    return Prepared(training, validation, listing, words, len(held_out))


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
    names: CaptionedImages | None,
    num_samples: int,
    transform: Transform,
    began: Began | None,
) -> Generator[CacheProgress, None, Samples]:
    """Return the samples to train on and the held-out samples; `names` is None for a stream."""
    used: Sequence[int] = range(num_samples)
    held_out: Sequence[int] = ()
    note = None
    if recipe.validation is not None:
        assert listing is not None, "the split is by the hashes in it"
        split = split_for(recipe.validation, listing, names)
        used, held_out, note = split.training, split.validation, split.note
    if began is not None:
        began.require_split(held_out, transform)
    if note is not None:
        yield CacheProgress("hold out pictures", num_samples, num_samples, (note,))
    return used, held_out


def _opened(
    data: CaptionedImages | StreamedImages,
) -> Generator[CacheProgress, None, dict[int, tuple[int, int]]]:
    """Return the sizes of pictures that nothing has read yet."""
    if isinstance(data, StreamedImages) or is_settled(data):
        return {}
    sizes = {}
    for n, size in opened_sizes(data):
        sizes[n] = size
        yield CacheProgress("open pictures", n + 1, len(data))
    return sizes


def _say(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    transform: Transform,
    listing: Listing | None,
    summarised: Callable[..., DataSummary],
    most: int | None,
    converted: Sequence[str] = (),
) -> Iterator[CacheProgress]:
    """Yield a summary of the data, and warnings about data and prompts, before the first step.

    At most `most` samples' captions are compared with the token limits; None compares all.
    """
    limits = limits_of(pipeline)
    names = None if isinstance(data, StreamedImages) else data
    hashes = None if listing is None or names is None else listing.hashes(len(names))
    summary = summarised(names, data, transform=transform, limits=limits, hashes=hashes)
    captions = each_text(islice(summary.captions.values(), most))
    lines = [*folder_warnings(data), *caption_warnings(captions, limits)]
    described: list[str] = []
    if not is_settled(data):  # generated scenes need no description
        described += summary.lines()
        lines += summary.warnings()
        if not isinstance(transform, BucketTransform):
            lines += crop_lines(summary.sizes.values())
    lines += converted
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
    notes = (*described, *(f"warning: {each}" for each in lines))
    if notes:
        yield CacheProgress("check the data", 1, 1, notes)


def _is_cached(asked: DataRecipe, num_samples: int, num_places: int) -> bool:
    """Whether to cache: `data.cache`, by default if samples are used more than once."""
    return num_places > num_samples if asked.cache is None else asked.cache
