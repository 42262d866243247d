"""Check what a recipe names besides models: data, prompts, references, metrics, output folder.

Opens everything with the functions that the commands use, so that it reports the same errors.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.configuration_utils import FrozenDict

from afa.denoisers.kinds import kind_of
from afa.distilling.planned import plan_of_distillation
from afa.drafting import DraftsRecipe, own_drafts, require_words
from afa.ensemble.prompt_syntax import words_of_prompt
from afa.ensemble.weighted_prompts import require_weighted
from afa.evaluation.planned import plan_of_evaluation, plan_of_search
from afa.files import is_unused, read_json, require_place_for_folder
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.manifest import read_manifest
from afa.loading.prompt_warnings import warnings_of_plan
from afa.loading.scheduler_choice import require_scheduler
from afa.loading.single_file.autoencoder import require_latents
from afa.loading.sources import locate_vae
from afa.loading.truncation import limits_of_folder, prompt_warnings
from afa.loading.vocabulary import read_words, word_warnings
from afa.preflight.data_inputs import check_data
from afa.preflight.found import Inputs
from afa.training.planned import plan_of_training

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afa.distilling.recipe import DistillRecipe
    from afa.ensemble.prompt_syntax import PromptSyntax
    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.loading.planned import Group, Plan
    from afa.training.recipe import Recipe


def inputs_of_training(
    recipe: Recipe, output: Path | None, progress: Callable[[str, int, int], object]
) -> Inputs:
    """Check what `afa train` reads: all pictures and captions, and the prompts of previews.

    Args:
        recipe: the training recipe.
        output: the output folder; None if unknown.
        progress: called with the number of samples read and their total.
    """
    from afa.training.cache import default_cache_folder
    from afa.training.drawn import read_prompts
    from afa.training.prepare import transform_of
    from afa.training.record import require_trackers
    from afa.training.run import require_same_recipe

    found, data_recipe = Inputs(), recipe.data
    if output is not None:
        with found.refusals("output"):
            require_same_recipe(recipe, output)
            require_place_for_folder(output, "The output")
    with found.refusals("trackers"):
        require_trackers(recipe.training.trackers)
    with found.refusals("cache"):
        cache = data_recipe.cache_folder or default_cache_folder()
        require_place_for_folder(cache, "The cache")
    plan = plan_of_training(recipe)
    _open_autoencoder(found, recipe.vae, plan.groups[0])
    limits: list[Any] = []
    kind, transform = None, None
    with found.refusals("resolution"):
        group = plan.groups[0]
        used = group.experts if group.fuse == "predictions" else group.experts[:1]
        folders = [read_manifest(expert, group.companions).config for expert in used]
        found_limits = [limits_of_folder(folder) for folder in folders]
        limits, kind = [each for own, _ in found_limits for each in own], found_limits[0][1]
        every = [_sizes(folder) for folder in folders]
        multiple = math.lcm(*(each.multiple for each in every))
        known = [each.largest for each in every if each.largest is not None]
        largest = min(known) if known else None
        transform = transform_of(recipe, every[0].native, multiple, largest)
        if (previews := recipe.previews) is not None:
            syntax = previews.prompt_syntax
            if syntax == "weighted":
                require_weighted(kind, fuses_predictions=group.fuse == "predictions")
            cut = prompt_warnings(
                limits, previews.prompts, guidance=previews.guidance, kind=kind, syntax=syntax
            )
            found.say("previews", cut)
    if recipe.previews is not None:
        with found.refusals("previews"):
            require_scheduler(plan, recipe.previews.scheduler)
    if (prompted := data_recipe.prompts) is not None:
        with found.refusals("prompts"):
            prompts = read_prompts(prompted.file)
            negative, guidance = prompted.negative_prompt, prompted.guidance
            cut = prompt_warnings(limits, prompts, negative, guidance=guidance, kind=kind)
            found.say("prompts", cut)
            counts = f"{prompted.number} pictures of {len(prompts)} prompts"
            found.say("prompts", [f"{counts} are drawn when the training starts."], "note")
            if recipe.training.offload_experts:
                found.say("prompts", ["Offloaded experts cannot draw them; see AFA-TRAIN-058."])
    with found.refusals("data"):
        check_data(found, recipe, limits, transform, output, progress)
    return found


def _open_autoencoder(found: Inputs, vae: str | Path | None, group: Group | None) -> None:
    """Check that the recipe's autoencoder exists, with the latent space of the experts."""
    if vae is not None:
        with found.refusals("autoencoder"):
            locate_vae(vae)
            if group is None:
                return
            facts = read_manifest(group.experts[0], group.companions).facts
            require_latents(vae, facts.name, facts.latents)


def inputs_of_evaluation(
    recipe: EvaluateRecipe, output: Path | None, progress: Callable[[str, int, int], object]
) -> Inputs:
    """Check what `afa evaluate` reads: prompts, metrics' weights, references, pruning plans.

    Args:
        recipe: the evaluation recipe.
        output: see `inputs_of_training`.
        progress: called with the number of references read and their total.
    """
    from afa.ensemble.caching.plan import load_plan
    from afa.evaluation.given import given_costs, picture_files
    from afa.evaluation.prompts import load_prompts, source_warnings
    from afa.evaluation.run import require_evaluation, require_same_evaluation
    from afa.evaluation.scoring import Scoring
    from afa.evaluation.work import Store, open_pictures

    found, is_resumed = Inputs(), False
    plan = plan_of_evaluation(recipe)
    uses_experts = any(method.needs_experts for method in recipe.methods)
    _open_autoencoder(found, recipe.vae, plan.groups[0] if uses_experts else None)
    with found.refusals("sampling"):
        require_scheduler(plan, recipe.sampling.scheduler)
    if output is not None:
        with found.refusals("output"):
            require_evaluation(output, recipe.references)
            require_place_for_folder(output, "The output")
            is_resumed = not is_unused(output)
    for method in recipe.methods:
        if method.plan is not None:
            with found.refusals("plan"):
                load_plan(method.plan)
    with tempfile.TemporaryDirectory(prefix="afa-check-", ignore_cleanup_errors=True) as scratch:
        prompts: list[Prompt] = []
        with found.refusals("prompts"):
            prompts = load_prompts(recipe.prompts, Path(scratch) / "references")
            found.say("prompts", source_warnings(recipe.prompts))
            syntax = recipe.sampling.prompt_syntax
            _say_truncated(found, plan, prompts, recipe.sampling, syntax)
            texts = [words_of_prompt(prompt.text, syntax) for prompt in prompts]
            for given in (place for method in recipe.methods for place in method.pictures or ()):
                with found.refusals("methods"):
                    given_costs(given)
                    picture_files(given, range(len(prompts)), recipe.sampling.seeds)
            for method in recipe.methods:
                if method.drafts is not None and method.drafts.needs_words:
                    for folder in method.ensemble or ():
                        with found.refusals("methods"):
                            require_words(method.drafts, read_words(ensemble_folder(folder)))
                for folder in [] if method.drafts is not None else method.ensemble or ():
                    found.say("prompts", word_warnings(ensemble_folder(folder), texts))
                    found.say("methods", _undrafted(method.name, folder, texts))
        if not prompts:
            return found
        if output is not None and is_resumed:
            with found.refusals("output"):
                require_same_evaluation(recipe, prompts, output)
        with found.refusals("metrics"):
            store = Store(Path(scratch))
            scoring = Scoring(recipe, prompts, store, torch.device("cpu"))
            found.say("metrics", scoring.warnings())
            for done, _ in enumerate(open_pictures(scoring.references), start=1):
                progress("references", done, len(scoring.references))
    return found


def _undrafted(method: str, folder: str, prompts: Sequence[str]) -> list[str]:
    """A warning if an ensemble draws such prompts by drafts, but the method does not."""
    drafts = own_drafts(folder, prompts)
    if drafts is None:
        return []
    written = DraftsRecipe(**dict(drafts)).model_dump(mode="json", exclude_defaults=True)
    return [
        f"afa generate draws such prompts with '{folder}' by drafts; the method '{method}' does "
        f"not. To compare these pictures, set its drafts: {json.dumps(written)}."
    ]


def inputs_of_search(
    recipe: SearchRecipe, output: Path | None, progress: Callable[[str, int, int], object]
) -> Inputs:
    """Check what `afa search` reads: prompts and the metric's weights."""
    from afa.evaluation.prompts import load_prompts, source_warnings
    from afa.evaluation.scoring import open_scorer
    from afa.evaluation.search import require_same_search, words_of

    del progress
    found = Inputs()
    plan = plan_of_search(recipe)
    _open_autoencoder(found, recipe.vae, plan.groups[0])
    with found.refusals("sampling"):
        require_scheduler(plan, recipe.sampling.scheduler)
    words: list[str] = []
    with found.refusals("prompts"):
        prompts = load_prompts(recipe.prompts)
        found.say("prompts", source_warnings(recipe.prompts))
        sampling = recipe.sampling
        _say_truncated(found, plan, prompts, sampling, sampling.prompt_syntax)
        words = words_of(prompts, sampling)
    with found.refusals("metric"):
        open_scorer(recipe.metric, torch.device("cpu"), words)
    if output is not None and not any(each.level == "error" for each in found.findings):
        with found.refusals("output"):
            require_same_search(recipe, output)
            require_place_for_folder(output, "The output")
    return found


def inputs_of_distillation(
    recipe: DistillRecipe, output: Path | None, progress: Callable[[str, int, int], object]
) -> Inputs:
    """Check what `afa distill` reads: prompts, pictures, the student's fit, earlier recordings."""
    from afa.distilling.passes import passes_of
    from afa.distilling.run import require_same_distillation
    from afa.distilling.student import require_fit
    from afa.distilling.teacher import Teacher
    from afa.evaluation.prompts import load_prompts, source_warnings
    from afa.training.record import require_trackers

    del progress
    found = Inputs()
    if output is not None:
        with found.refusals("output"):
            require_same_distillation(recipe, output)
            require_place_for_folder(output, "The output")
    with found.refusals("trackers"):
        require_trackers(recipe.training.trackers)
    if recipe.previews is not None:
        with found.refusals("previews"):
            require_scheduler(plan_of_distillation(recipe), recipe.previews.scheduler)
    with found.refusals("student"):
        require_fit(Teacher.of(recipe), recipe.student)
    if (drawn := recipe.trajectories) is not None:
        with found.refusals("prompts"):
            prompts = load_prompts(drawn.prompts)
            found.say("prompts", source_warnings(drawn.prompts))
            # a distillation only draws plain prompts
            _say_truncated(found, plan_of_distillation(recipe), prompts, recipe.sampling, None)
    with found.refusals("data"):
        passes_of(recipe)
    return found


def _say_truncated(
    found: Inputs,
    plan: Plan,
    prompts: list[Prompt],
    sampling: SamplingRecipe,
    syntax: PromptSyntax | None,
) -> None:
    texts = [prompt.text for prompt in prompts]
    lines = warnings_of_plan(plan, texts, sampling.negative_prompt, sampling.guidance, syntax)
    found.say("prompts", lines)


class _Sizes(NamedTuple):
    """The sizes of a model's pictures in pixels.

    Attributes:
        native: its native size.
        multiple: sides must be multiples of it.
        largest: the longest side; None for no limit.
    """

    native: int
    multiple: int
    largest: int | None


def _sizes(folder: Path) -> _Sizes:
    """Read the sizes of a model's pictures from its configurations."""
    kind = kind_of(str(read_json(folder / "model_index.json").get("_class_name")), folder)
    config = FrozenDict(read_json(folder / kind.denoiser / "config.json"))
    autoencoder = folder / "vae" / "config.json"
    blocks = read_json(autoencoder)["block_out_channels"] if autoencoder.is_file() else [0] * 4
    scale = 2 ** (len(blocks) - 1)
    latent = kind.max_latent(config)
    largest = None if latent is None else scale * latent
    return _Sizes(min(kind.native_size(config)) * scale, scale * kind.patch(config), largest)
