"""What a recipe of any command would load, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import SABWConfig
from afa.checkpoint import ensemble_folder
from afa.memory.needs import Training
from afa.pipeline import first_folder
from afa.preflight.machine import Work
from afa.published import is_published, published_aggregators, published_experts
from afa.saved import read_config, saved_aggregators, sources_in
from afa.single_file import Companions
from afa.training.engine import pick_device
from afa.weights import hash_files, weights_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.baselines.merging.recipe import MergeRecipe
    from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe
    from afa.evaluation.search import SearchRecipe
    from afa.lora import Asked
    from afa.training.recipe import Recipe

_NUM_STEPS = 50  # of a picture, where nobody says


@dataclass(frozen=True)
class Group:
    """Experts that are to work together.

    Attributes:
        label: what they are for.
        experts: as recipes name them.
        companions: what single files leave out.
        aggregators: of all sites; None for the mean, or where there is nothing to fuse.
        allow_duplicates: whether one may be named twice.
        is_loose: whether it may be of a kind that nothing is known of, as what is merged may.
        num_experts: where one folder holds several; None where each is named.
        encoder_sets: likewise, how many different text encoders they have.
    """

    label: str
    experts: Sequence[Asked]
    companions: Companions
    aggregators: SABWConfig | None = None
    allow_duplicates: bool = False
    is_loose: bool = False
    num_experts: int | None = None
    encoder_sets: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a recipe would load.

    Attributes:
        groups: of experts, each loaded by itself.
        work: of every group; None where no step is taken.
    """

    groups: Sequence[Group]
    work: Work | None = None


def plan_of_training(recipe: Recipe) -> Plan:
    """Of `afa train`."""
    settings, side = recipe.training, recipe.data.resolution
    dtype = getattr(torch, settings.expert_dtype)
    group = Group(
        "training",
        recipe.experts,
        _companions(recipe, dtype),
        SABWConfig(**recipe.aggregator.model_dump()),
        recipe.allow_duplicates,
    )
    training = Training(settings.gradient_checkpointing, settings.ema_decay is not None)
    work = Work(
        pick_device(settings.device),
        settings.batch_size,
        "batch_size",
        num_steps=settings.num_steps,
        training=training,
        pixels=side and side**2,
        is_offloaded=settings.offload_experts,
    )
    return Plan([group], work)


def plan_of_evaluation(recipe: EvaluateRecipe) -> Plan:
    """Of `afa evaluate`: every model and ensemble by itself, and what merges and fusions take."""
    sampling = recipe.sampling
    dtype = getattr(torch, sampling.dtype)
    companions = _companions(recipe, dtype)
    groups = []
    if any(method.needs_experts for method in recipe.methods):
        groups.append(Group("merges and fusions", recipe.experts, companions))
        if recipe.base is not None:
            groups.append(Group("base", [recipe.base], companions))
    for method in recipe.methods:
        groups += [Group(method.name, [model], companions) for model in method.model or ()]
        groups += [_ensemble(method.name, folder, dtype) for folder in method.ensemble or ()]
    return Plan(groups, _drawing(sampling))


def plan_of_search(recipe: SearchRecipe) -> Plan:
    """Of `afa search`."""
    sampling = recipe.sampling
    companions = _companions(recipe, getattr(torch, sampling.dtype))
    group = Group("search", recipe.experts, companions)
    return Plan([group], _drawing(sampling))


def plan_of_merge(recipe: MergeRecipe) -> Plan:
    """Of `afa merge`, which has one tensor of each in memory."""
    experts = [*recipe.experts, *([] if recipe.base is None else [recipe.base])]
    companions = Companions(torch.float32, fallback=first_folder(experts))
    return Plan([Group("merge", experts, companions, allow_duplicates=True, is_loose=True)])


def plan_of_ensemble(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    samples_each: int = 2,
    num_steps: int = _NUM_STEPS,
    pixels: int | None = None,
) -> Plan:
    """Of `afa generate`; as it is without options, one picture with guidance."""
    work = Work(device, 1, samples_each=samples_each, num_steps=num_steps, pixels=pixels)
    return Plan([_ensemble("ensemble", folder, dtype)], work)


def _drawing(sampling: SamplingRecipe) -> Work:
    """Of pictures in batches; with guidance each of them is two samples."""
    height, width = sampling.height, sampling.width
    return Work(
        pick_device(sampling.device),
        sampling.batch_size,
        "sampling.batch_size",
        samples_each=2 if sampling.guidance > 1 else 1,
        num_steps=sampling.num_steps,
        pixels=height * width if height and width else None,
    )


def _companions(recipe: Any, dtype: torch.dtype) -> Companions:
    named: Any = recipe.experts
    return Companions(
        dtype,
        config=recipe.config,
        fallback=first_folder(named),
        parts=recipe.parts or (),
        own_vae=recipe.vae is None,
    )


def _ensemble(label: str, folder: str | Path, dtype: torch.dtype) -> Group:
    """The experts that an ensemble's folder names; of the published code's the folder itself."""
    place = ensemble_folder(folder)
    if is_published(place):
        inside = published_experts(place)
        encoders = {hash_files(part, weights_in(part)[1]) for _, part in inside}
        return Group(
            label,
            [place],
            Companions(dtype),
            published_aggregators(place),
            num_experts=len(inside),
            encoder_sets=len(encoders),
        )
    saved = read_config(place)
    experts, config, parts = sources_in(saved, place)
    return Group(
        label,
        experts,
        Companions(
            dtype,
            config=config,
            fallback=first_folder(experts),
            parts=parts,
            own_vae=saved["vae"] is None or saved["vae"]["source"] == saved["experts"][0]["source"],
        ),
        saved_aggregators(saved),
        allow_duplicates=True,  # whoever trained it has allowed them
    )
