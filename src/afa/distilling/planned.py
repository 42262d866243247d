"""The models that a distillation loads, and its work, for checks before it starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from afa.distilling.recipe import DistillRecipe
from afa.distilling.student import initial_source
from afa.distilling.teacher import Teacher
from afa.loading.planned import Group, Plan, Work, group_of_ensemble
from afa.training.engine import pick_device


def plan_of_distillation(recipe: DistillRecipe) -> Plan:
    """Return the plan of `afa distill`: the teacher that draws, and the student's own model.

    Raises:
        AfaError: if the teacher cannot be read, or lacks the expert that the student names.
    """
    dtype = getattr(torch, recipe.recording.dtype)
    teacher, named = Teacher.of(recipe), recipe.teacher
    if named.ensemble is not None:
        groups = [group_of_ensemble("teacher", named.ensemble[0], dtype)]
    else:
        merged, companions = named.merge is not None, teacher.companions(dtype)
        groups = [Group("teacher", teacher.experts, companions, is_merged=merged)]
        if recipe.base is not None:
            base = Group("base", [recipe.base], teacher.companions(dtype), is_drawn=False)
            groups.append(base)
    if named.drafts is not None:
        alone = replace(teacher.companions(dtype), own_vae=True)
        groups.append(Group("judge", [named.drafts.judge], alone))
    source = initial_source(teacher, recipe.student.init)
    if source is not None and source not in teacher.experts:
        groups.append(Group("student", [source], teacher.companions(), is_drawn=False))
    sampling = recipe.sampling
    height, width = sampling.height, sampling.width
    work = Work(
        pick_device(sampling.device),
        sampling.batch_size,
        "recording.batch_size",
        samples_each=2 if sampling.guidance > 1 else 1,
        num_steps=sampling.num_steps,
        pixels=height * width if height and width else None,
    )
    return Plan(groups, work)
