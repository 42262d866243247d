"""The recipes of the pictures that `afa generate` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.cli.console import say
from afa.cli.folder import stems_of
from afa.cli.wanted import of_parameters
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.cli.wanted import Wanted
    from afa.drawing.recorded import PictureRecipe
    from afa.ensemble.prompt_syntax import PromptSyntax


def reproduced(
    picture: Path, ensemble: str | None, weights: bool, loading: dict[str, Any]
) -> tuple[DiffusionPipeline, PictureRecipe, str]:
    """The pipeline that draws a picture of afa again, its recipe, and the hash of its pixels.

    Raises:
        AfaError: if the picture has no valid recipe, or its models are not there.
    """
    from afa.drawing import pictures, recorded
    from afa.drawing.contenders import ENSEMBLE

    made = recorded.read_picture(picture)
    recipe = made.recipe.model_copy(update={"ensemble": ensemble or made.recipe.ensemble})
    if weights and recipe.drawn_by != ENSEMBLE:
        raise AfaError(
            "AFA-CLI-009",
            f"'{picture}' has no fusion weights: {recipe.drawn_by} drew it. Remove --weights.",
        )
    return pictures.prepare_again(recipe, **loading), recipe, made.pixels


def wanted_by_picture(
    picture: Path,
    wanted: Wanted,
    ensemble: str | None,
    given: Collection[str],
    syntax: PromptSyntax,
    *,
    is_main: bool,
) -> Wanted | None:
    """What A1111's text in another program's picture asks for; says what it does not understand.

    Args:
        picture: the file.
        wanted: the options of the command.
        ensemble: draws the new picture.
        given: the names of the options that the user has passed, which replace the text's.
        syntax: how its prompts will be read.
        is_main: whether this process prints.

    Returns: None for a picture of afa, and for one without such a text.

    Raises:
        AfaError: if there is no ensemble, or a setting is unknown.
    """
    from afa.denoisers.scheduler_names import canonical_name
    from afa.drawing.parameters import read_parameters
    from afa.drawing.recorded import has_recipe

    found = None if has_recipe(picture) else read_parameters(picture, syntax)
    if found is None:
        return None
    if ensemble is None:
        raise AfaError(
            "AFA-CLI-040",
            f"'{picture}' is a picture of another program, which does not name an ensemble. Pass "
            f"one: afa generate ENSEMBLE --from-image {picture} --output ...",
        )
    name = None
    if found.sampler is not None and "scheduler" not in given:
        name = canonical_name(found.sampler)
    if is_main:
        say(
            f"'{picture}' is a picture of another program: its settings are used, but it cannot be "
            "reproduced, because models, noise and samplers differ."
        )
        for note in found.notes:
            say(f"warning: {note}")
    return of_parameters(found, wanted, list(given), name)


def fields_of_inputs(
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    hires: float | None,
    hires_strength: float | None,
) -> dict[str, Any]:
    """The fields of a recipe for --image, --mask, --strength, --hires and --hires-strength.

    Raises:
        AfaError: if one is given without another that it needs, or is out of range.
    """
    for option, is_given, needed in (
        ("--mask", mask is not None, image is not None or "--image"),
        ("--strength", strength is not None, image is not None or "--image"),
        ("--hires-strength", hires_strength is not None, hires is not None or "--hires"),
    ):
        if is_given and needed is not True:
            raise AfaError("AFA-CLI-043", f"{option} requires {needed}. Pass it, or remove it.")
    if image is not None and hires is not None:
        raise AfaError("AFA-CLI-044", "--image excludes --hires. Remove one of them.")

    from afa.drawing.inputs import hash_input
    from afa.drawing.recorded import require_ranges

    fields: dict[str, Any] = {"hires": hires}
    for name, path in (("image", image), ("mask", mask)):
        if path is not None:
            fields[name] = {"path": str(path), "sha256": hash_input(path)}
    for name, value in (("strength", strength), ("hires_strength", hires_strength)):
        if value is not None:
            fields[name] = value
    require_ranges(fields)
    return fields


def most_pixels(wanted: Sequence[Wanted], drawn_from: dict[str, Any]) -> int | None:
    """The largest number of pixels of a picture; None if it is the experts' own size."""
    image, scale = drawn_from.get("image"), drawn_from["hires"] or 1
    known = [each.pixels for each in wanted if each.pixels is not None]
    if image is not None and len(known) < len(wanted):
        from afa.drawing.inputs import size_of_input

        height, width = size_of_input(image["path"], 1)
        known.append(height * width)
    return int(max(known) * scale * scale) if known else None


def recipes_of(
    pipeline: DiffusionPipeline,
    wanted: Sequence[Wanted],
    num_images: int,
    shared: dict[str, Any],
) -> list[tuple[str, PictureRecipe]]:
    """The stem of each picture's file name, and its recipe.

    Args:
        pipeline: draws them.
        wanted: prompts and their settings.
        num_images: pictures of each, whose seeds follow each other.
        shared: the fields of all recipes.

    Raises:
        AfaError: if a setting, a size or a scheduler does not fit the models.
    """
    from afa.denoisers.schedulers import scheduler_for
    from afa.drawing import inputs, pictures, recorded
    from afa.drawing.contenders import ENSEMBLE
    from afa.loading.task import size_multiple

    assert shared.get("drawn_by", ENSEMBLE) == ENSEMBLE, "others are only reproduced"
    for name in dict.fromkeys(each.scheduler for each in wanted if each.scheduler):
        scheduler_for(pipeline, name)
    recipes = []
    for each in wanted:
        height, width = _size(pipeline, each, shared.get("image"))
        for seed in range(each.seed, each.seed + num_images):
            recipe = recorded.picture_recipe(
                prompt=each.prompt,
                negative_prompt=each.negative_prompt,
                seed=seed,
                steps=each.steps,
                guidance=each.guidance,
                height=height,
                width=width,
                scheduler=each.scheduler,
                **shared,
            )
            inputs.require_passes(recipe, size_multiple(pipeline))
            pictures.require_no_drafts(pipeline, recipe)
            recipes.append(recipe.model_copy(update=pictures.drafts_of(pipeline, recipe.words)))
    return list(zip(stems_of(wanted, num_images), recipes, strict=True))


def _size(
    pipeline: DiffusionPipeline, wanted: Wanted, image: dict[str, str] | None
) -> tuple[int, int]:
    """Height and width of a picture: by default that of the initial picture, or the experts' own.

    Raises:
        AfaError: see `picture_size`.
    """
    if image is None or wanted.height or wanted.width:
        return picture_size(pipeline, wanted.height, wanted.width)
    from afa.drawing.inputs import size_of_input
    from afa.loading.task import size_multiple

    return size_of_input(image["path"], size_multiple(pipeline))


def picture_size(
    pipeline: DiffusionPipeline, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels; defaults to the experts' own.

    Raises:
        AfaError: if one is not a multiple of the experts' smallest step.
    """
    from afa.loading.task import native_resolution, size_multiple

    native, multiple = native_resolution(pipeline), size_multiple(pipeline)
    for name, size in (("--height", height), ("--width", width)):
        if size is not None and size % multiple:
            raise AfaError(
                "AFA-CLI-013", f"{name} must be a multiple of {multiple} pixels; got {size}."
            )
    # diffusers ignores one without the other
    return height or native[0], width or native[1]


def prompt_warnings(
    pipeline: DiffusionPipeline, planned: Sequence[tuple[str, PictureRecipe]]
) -> list[str]:
    """Warnings of truncated prompts, unknown words, schedulers, sizes and initial pictures."""
    from afa.drawing.sampling_warnings import sampling_warnings
    from afa.loading.ensemble_folder import ensemble_folder
    from afa.loading.truncation import warnings_for
    from afa.loading.vocabulary import word_warnings

    recipes = [recipe for _, recipe in planned]
    texts = list(dict.fromkeys(recipe.prompt for recipe in recipes))
    warnings = list[str]()
    for negative in dict.fromkeys((each.negative_prompt, each.guidance) for each in recipes):
        warnings += warnings_for(pipeline, texts, *negative, recipes[0].prompt_syntax)
    fused = [recipe.words for recipe in recipes if recipe.drafts is None]
    warnings += word_warnings(ensemble_folder(recipes[0].ensemble), fused)
    if recipes[0].image is not None:
        warnings += [_fitted(recipe) for recipe in recipes]
    warnings += sampling_warnings(
        pipeline, recipes, size_advice="Set another --size; --hires 2 enlarges a picture well."
    )
    return [line for line in dict.fromkeys(warnings) if line]


def _fitted(recipe: PictureRecipe) -> str:
    """Say that the initial picture is scaled or cropped; empty if it is not."""
    from afa.drawing.inputs import open_input

    assert recipe.image is not None, "it has one"
    picture = open_input(recipe.image)
    if picture.size == (recipe.width, recipe.height):
        return ""
    return (
        f"'{recipe.image.path}' has {picture.width} x {picture.height} pixels; it is scaled to "
        f"cover {recipe.width} x {recipe.height}, and its centre is used."
    )
