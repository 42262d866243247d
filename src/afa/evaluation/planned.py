"""Plans of what an evaluation or a search loads and computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from afa.loading.planned import Group, Plan, Work, companions_of, group_of_ensemble
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.loading.expert_source import AnySource


def plan_of_evaluation(recipe: EvaluateRecipe) -> Plan:
    """The plan of `afa evaluate`: models, ensembles, and the experts of merges and fusions."""
    sampling = recipe.sampling
    dtype = getattr(torch, sampling.dtype)
    companions = companions_of(recipe, dtype)
    alone = replace(companions, own_vae=True)  # a single model uses its own autoencoder
    groups = []
    if any(method.needs_experts for method in recipe.methods):
        fusions = [method.fusion for method in recipe.methods if method.fusion is not None]
        models: list[AnySource] = list(recipe.experts)
        if recipe.base is not None and any(fusion.with_base for fusion in fusions):
            models.append(recipe.base)
        merged = any(method.merge is not None for method in recipe.methods)
        groups.append(Group("merges and fusions", models, companions, is_merged=merged))
        if recipe.base is not None:
            groups.append(Group("base", [recipe.base], companions, is_drawn=False))
    for method in recipe.methods:
        groups += [Group(method.name, [model], alone) for model in method.model or ()]
        groups += [
            group_of_ensemble(method.name, folder, dtype) for folder in method.ensemble or ()
        ]
        if method.drafts is not None:
            groups.append(Group(f"judge of {method.name}", [method.drafts.judge], alone))
    return Plan(groups, _drawing(sampling))


def plan_of_search(recipe: SearchRecipe) -> Plan:
    """The plan of `afa search`."""
    sampling = recipe.sampling
    companions = companions_of(recipe, getattr(torch, sampling.dtype))
    group = Group("search", recipe.experts, companions, is_merged=True)
    return Plan([group], _drawing(sampling))


def _drawing(sampling: SamplingRecipe) -> Work:
    """The work of drawing batches; with guidance each picture takes two samples."""
    height, width = sampling.height, sampling.width
    return Work(
        pick_device(sampling.device),
        sampling.batch_size,
        "sampling.batch_size",
        samples_each=2 if sampling.guidance > 1 else 1,
        num_steps=sampling.num_steps,
        pixels=height * width if height and width else None,
    )
