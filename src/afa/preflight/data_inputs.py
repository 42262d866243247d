"""Check the pictures and captions of a training recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.machine.processes import num_launched
from afa.reading import Tally
from afa.training.began import Began
from afa.training.buckets import crop_lines
from afa.training.checkpoints import Checkpoints
from afa.training.continuing import require_same
from afa.training.data import Joined, StreamedImages, open_data, open_validation
from afa.training.data.images import repeated
from afa.training.data.survey import folder_warnings, survey
from afa.training.examples import Broken
from afa.training.grouping import Grouping
from afa.training.listing import Listing, content_of, is_settled, rows_of
from afa.training.run import CHECKPOINTS, require_words
from afa.training.split import split_for
from afa.training.transform import BucketTransform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from afa.preflight.found import Inputs
    from afa.training.buckets import Size
    from afa.training.data import CaptionedImages
    from afa.training.recipe import Recipe
    from afa.training.transform import Transform


def check_data(
    found: Inputs,
    recipe: Recipe,
    limits: Sequence[Any],
    transform: Transform | None,
    output: Path | None,
    progress: Callable[[str, int, int], object],
) -> None:
    """Read all pictures and captions of a training, and record what is found.

    Args:
        found: receives the findings.
        recipe: of the training.
        limits: token limits of the text encoders.
        transform: crops and flips of the training pictures; None if they are unknown.
        output: the output folder; None if unknown.
        progress: called with the number of samples read and their total.

    Raises:
        AfaError: the first error that `afa train` raises, too.
    """
    asked = recipe.data
    data = open_data(asked)
    if data is None:
        return
    found.transform, found.has_data = transform, True
    validated = open_validation(recipe)
    require_words(recipe, data)
    if isinstance(data, StreamedImages):
        found.say("data", folder_warnings(data))
        found.say("data", ["Streamed data is only read during training, not checked."], "note")
        return
    joined: CaptionedImages = data if validated is None else Joined(data, validated)
    listing = None
    if recipe.validation is not None or not is_settled(joined):
        rows = [row for chunk in rows_of(joined, range(len(joined))) for row in chunk]
        listing = Listing.of(rows)
    tally = _read(found, recipe, data, joined, listing, limits, transform, progress)
    used: Sequence[int] = range(len(data))
    if recipe.validation is not None and listing is not None:
        split = split_for(recipe.validation, listing, joined)
        used = split.training
        found.say("validation", [split.note], "note")
    if isinstance(transform, BucketTransform) and found.details is not None:
        _say_buckets(found, recipe, transform, found.details.sizes, repeated(data, used))
    if output is not None and asked.prompts is None:
        run = _run(recipe, output)
        found.say(
            "data", run.require_data(content_of(joined, listing), listing, joined, tally), "note"
        )
        if asked.repeats:
            run.require_repeats(repeated(joined, used))


def _read(
    found: Inputs,
    recipe: Recipe,
    data: CaptionedImages,
    joined: CaptionedImages,
    listing: Listing | None,
    limits: Sequence[Any],
    transform: Transform | None,
    progress: Callable[[str, int, int], object],
) -> Tally:
    """Read every picture, except the zoo's scenes, of which none can be broken."""
    tally, broken = Tally(), list[str]()
    side = recipe.data.resolution if transform is None else transform.resolution
    done = 0

    def note(number: int, _: int) -> None:
        progress("pictures", done + number, len(joined))

    if not is_settled(data):
        hashes = None if listing is None else listing.hashes(len(data))
        surveyed = survey(data, limits, side, note, transform=transform, hashes=hashes)
        found.summary, found.details = surveyed.summary, surveyed.details
        tally, broken = surveyed.tally, list(surveyed.broken)
        found.say("data", surveyed.warnings)
        if recipe.data.buckets is None and found.details is not None:
            found.say("data", crop_lines(found.details.sizes.values()))
        done = len(data)
    if isinstance(joined, Joined) and len(joined) > len(data):
        surveyed = survey(joined.parts[-1], limits, side, note, transform=transform)
        found.say("validation", [f"Validation pictures: {surveyed.summary}."], "note")
        found.say("validation", surveyed.warnings)
        broken += surveyed.broken
    Broken(len(joined), recipe.data.max_broken).note(dict(enumerate(broken)))
    found.say("data", broken[:3])
    return tally


def _say_buckets(
    found: Inputs,
    recipe: Recipe,
    transform: BucketTransform,
    sizes: Mapping[int, Size],
    samples: Sequence[int],
) -> None:
    """Record how many pictures each bucket has."""
    settings = recipe.training
    per_step = num_launched() * settings.batch_size * settings.gradient_accumulation_steps
    targets = {sample: transform.target(size) for sample, size in sizes.items()}
    grouping = Grouping(targets, samples, per_step, {})
    found.say("buckets", [grouping.summary(transform, sizes)], "note")
    found.say("buckets", grouping.warnings(settings.num_steps, settings.seed))


def _run(recipe: Recipe, output: Path) -> Began:
    """What a run in the output folder began with."""
    folder = output / CHECKPOINTS
    checkpoint = Checkpoints(folder).read()
    began = None if checkpoint is None else checkpoint.notes.get("made_from") or {}
    return Began(
        output,
        began,
        validates=recipe.validation is not None,
        bind=lambda now: require_same(began or {}, now, folder),
    )
