"""The models that a training loads, and its work, for checks before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from afa.aggregators import SABWConfig
from afa.loading.memory.needs import Training
from afa.loading.planned import Group, Plan, Work, companions_of
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from afa.training.recipe import Recipe


def plan_of_training(recipe: Recipe) -> Plan:
    """Return the plan of `afa train`."""
    settings, side = recipe.training, recipe.data.resolution
    dtype = getattr(torch, settings.expert_dtype)
    group = Group(
        "training",
        recipe.experts,
        companions_of(recipe, dtype),
        SABWConfig(**vars(recipe.aggregator)),
        recipe.allow_duplicates,
        fuse=recipe.fuse,
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
    alone = replace(group.companions, own_vae=True)  # a judge has its own autoencoder
    prompts = recipe.data.prompts
    drafts = [recipe.drafts, None if prompts is None else prompts.drafts]
    judges = dict.fromkeys(each.judge for each in drafts if each is not None)
    return Plan([group, *(Group("judge", [judge], alone) for judge in judges)], work)
