"""The examples of a training, encoded beforehand where that pays."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError
from afa.loading.pipeline import native_resolution, size_multiple
from afa.loading.truncation import limits_of, warnings_for
from afa.reading import BrokenSample, Tally, conversions_of
from afa.training.cache import (
    CachedExamples,
    CacheProgress,
    LatentCache,
    LatentShards,
    TextCache,
    default_cache_folder,
)
from afa.training.data import StreamedImages
from afa.training.data.survey import caption_warnings, folder_warnings, known_captions
from afa.training.examples import LiveExamples
from afa.training.listing import Listing, digest_of, is_settled, rows_of
from afa.training.order import Purpose
from afa.training.split import split_by_picture
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from diffusers import DiffusionPipeline

    from afa.training.began import Began
    from afa.training.data import CaptionedImages
    from afa.training.engine import Engine
    from afa.training.examples import Examples
    from afa.training.recipe import DataRecipe, Recipe

    Samples = tuple[Sequence[int], Sequence[int]]


class Prepared(NamedTuple):
    """Examples for training, and for validation where there is any; what the data was."""

    training: Examples
    validation: Examples | None
    listing: Listing | None


def prepare_examples(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    data: CaptionedImages | StreamedImages,
    engine: Engine,
    began: Began | None = None,
) -> Generator[CacheProgress, None, Prepared]:
    """Examples for training and for validation, encoded beforehand where that pays.

    Args:
        recipe: of the training.
        pipeline: with the parts that encode.
        data: pictures and captions.
        engine: the processes.
        began: what the run began with; None where nothing is kept.

    Raises:
        AfaError: other data than the run began with, too few pictures to hold some out, a
            resolution that does not fit, or what the cache raises.
    """
    settings, asked = recipe.training, recipe.data
    transform = Transform(
        asked.resolution or min(native_resolution(pipeline)),
        asked.crop,
        asked.flip,
        asked.num_variants,
        settings.seed,
    )
    require_resolution(transform.resolution, size_multiple(pipeline))
    common: Any = {"seed": settings.seed, "max_broken": asked.max_broken, "device": engine.device}
    trains: Any = {"caption_dropout": settings.caption_dropout}
    validates: Any = {"purpose": Purpose.VALIDATION}
    listing, content = None, None
    if not isinstance(data, StreamedImages):
        if not is_settled(data) or recipe.validation is not None:
            listing = yield from _list_samples(data, engine, began)
        # of scenes the listing does not tell where the objects are
        content = digest_of(data) if listing is None or is_settled(data) else listing.digest
        yield from _require_data(began, content, listing, data)
    if not _is_cached(asked, data, settings.num_steps * engine.shares(settings).total):
        assert not isinstance(data, StreamedImages), "a stream is always cached"
        used, held_out = yield from _split(recipe, listing, len(data), transform, began)
        if engine.is_main:
            num_places = settings.num_steps * engine.shares(settings).total
            captions = known_captions(data, num_places)
            yield from _say(recipe, pipeline, data, caption_warnings(captions, limits_of(pipeline)))
        live: Any = {**common, "num_workers": asked.num_workers, "tally": Tally()}
        training = LiveExamples(pipeline, data, transform, samples=used, **trains, **live)
        if not held_out:
            return Prepared(training, None, listing)
        held = LiveExamples(pipeline, data, transform, samples=held_out, **validates, **live)
        return Prepared(training, held, listing)
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
    if engine.is_main:
        yield from _say(recipe, pipeline, data, _of_latents(pipeline, latents))
    used, held_out = yield from _split(recipe, listing, latents.num_samples, transform, began)
    cached = CachedExamples(
        pipeline,
        latents,
        text,
        transform,
        samples=used,
        purpose=Purpose.TRAINING,
        **trains,
        **common,
    )
    if not held_out:
        return Prepared(cached, None, listing)
    kept = CachedExamples(
        pipeline, latents, text, transform, samples=held_out, **validates, **common
    )
    return Prepared(cached, kept, listing)


def require_resolution(side: int, multiple: int) -> None:
    """Refuse a side of pictures, in pixels, in which the experts do not work.

    Raises:
        AfaError: it is no multiple.
    """
    if side % multiple:
        raise AfaError(
            "AFA-TRAIN-042",
            f"data.resolution must be a multiple of {multiple}, in which the experts work, came "
            f"{side}.",
        )


def _list_samples(
    data: CaptionedImages, engine: Engine, began: Began | None
) -> Generator[CacheProgress, None, Listing]:
    """Hash all pictures and captions; each process takes a part.

    Files that the run knows from before are read only where somebody wrote into them.
    """
    known = began.listing.known() if began is not None and began.listing is not None else None
    share = -(-len(data) // engine.num_processes)
    mine = range(len(data))[engine.rank * share : (engine.rank + 1) * share]
    rows = []
    for some in rows_of(data, mine, known):
        rows += some
        yield CacheProgress("look at pictures", len(rows), len(mine))
    return Listing.of(engine.gather(rows))


def _require_data(
    began: Began | None,
    content: str,
    listing: Listing | None,
    names: CaptionedImages | None,
    tally: Tally | None = None,
) -> Generator[CacheProgress, None, None]:
    """Refuse to continue with other data; `tally` is of pictures that are read already."""
    if began is None:
        return
    if tally is None:
        tally = Tally()
        if began.is_earlier and names is not None and not is_settled(names):
            yield from _read_all(names, tally)
    if notes := began.require_data(content, listing, names, tally):
        yield CacheProgress("look at pictures", 1, 1, tuple(notes))


def _read_all(data: CaptionedImages, tally: Tally) -> Iterator[CacheProgress]:
    """Read all pictures to see what is converted; those that are broken are named later."""
    for index in range(len(data)):
        with suppress(BrokenSample):
            tally.add(index, conversions_of(data[index][0]))
        yield CacheProgress("look at pictures", index + 1, len(data))


def _split(
    recipe: Recipe,
    listing: Listing | None,
    num_samples: int,
    transform: Transform,
    began: Began | None,
) -> Generator[CacheProgress, None, Samples]:
    """The samples to train on, and those that are held out."""
    used: Sequence[int] = range(num_samples)
    held_out: Sequence[int] = ()
    note = None
    if recipe.validation is not None:
        assert listing is not None, "pictures are told apart by it"
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
    found: list[str],
) -> Iterator[CacheProgress]:
    """What a user should know of data and prompts, before the first step."""
    lines = [*folder_warnings(data), *found]
    previews = recipe.previews
    if previews is not None:
        cut = warnings_for(pipeline, previews.prompts, guidance=previews.guidance)
        lines += [f"previews: {line}" for line in cut]
    if lines:
        yield CacheProgress("look at the data", 1, 1, tuple(f"warning: {each}" for each in lines))


def _of_latents(pipeline: DiffusionPipeline, latents: LatentShards) -> list[str]:
    """What encoding has shown of captions and pictures."""
    converted = latents.tally.line()
    return [
        *caption_warnings(latents.all_captions, limits_of(pipeline)),
        *([] if converted is None else [converted]),
    ]


def _is_cached(asked: DataRecipe, data: CaptionedImages | StreamedImages, num_places: int) -> bool:
    """As asked; by default where the training goes over the data more than once."""
    if isinstance(data, StreamedImages):
        return True
    return num_places > len(data) if asked.cache is None else asked.cache
