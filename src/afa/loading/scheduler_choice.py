"""Check the scheduler that a recipe asks for before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.objective import objective_of
from afa.denoisers.schedulers import require_exact_timesteps, scheduler_from
from afa.ensemble.conversion import Objectives
from afa.loading.manifest import read_manifest
from afa.loading.prediction import scheduler_of

if TYPE_CHECKING:
    from afa.loading.planned import Plan


def require_scheduler(plan: Plan, name: str | None) -> None:
    """Check that a scheduler fits all models of a plan that draw.

    Args:
        plan: of a training, an evaluation or a search.
        name: of the scheduler; None for the models' own.

    Raises:
        AfaError: if an expert cannot be read, or the scheduler does not fit it.
    """
    if name is None:
        return
    for group in plan.groups:
        if not group.is_drawn or group.label.startswith("judge"):  # judges do not draw
            continue
        manifests = [read_manifest(expert, group.companions) for expert in group.experts]
        own = [scheduler_of(each.config, each.described.prediction) for each in manifests]
        made = scheduler_from(own[0], manifests[0].facts.kind, name)
        objectives = Objectives.of([objective_of(each) for each in own])
        if objectives is not None:
            require_exact_timesteps(made, objectives.wanted, name)
