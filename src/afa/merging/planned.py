"""Plan of what a merge loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.loading.expert_source import first_folder
from afa.loading.planned import Group, Plan
from afa.loading.single_file.load import Companions

if TYPE_CHECKING:
    from afa.merging.recipe import MergeRecipe


def plan_of_merge(recipe: MergeRecipe) -> Plan:
    """The plan of `afa merge`, which holds one tensor of each checkpoint in memory."""
    experts = [*recipe.experts, *([] if recipe.base is None else [recipe.base])]
    companions = Companions(torch.float32, fallback=first_folder(experts))
    return Plan(
        [Group("merge", experts, companions, allow_duplicates=True, is_loose=True, is_merged=True)]
    )
