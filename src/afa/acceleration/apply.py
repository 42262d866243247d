"""Any pipeline, faster: an ensemble or a single model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.acceleration.plan import PruningPlan, load_plan
from afa.acceleration.settings import EXACT, Acceleration, acceleration_of
from afa.aggregators import Separate
from afa.denoisers import discover_sites
from afa.ensemble import EnsembleDenoiser
from afa.errors import AfaError
from afa.kinds import build_pipeline, denoiser_of, kind_of_pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline


def accelerate(
    pipeline: DiffusionPipeline,
    acceleration: str | Mapping[str, Any] | Acceleration = EXACT,
    *,
    plan: PruningPlan | str | Path | None = None,
) -> DiffusionPipeline:
    """Leave out a part of what a pipeline computes.

        pipeline = afa.accelerate(afa.load_ensemble("zoo:ensemble"), "fast")

    Args:
        pipeline: with an ensemble, whose settings are changed in place; or with a single model,
            which then is an ensemble of one, and exactly what it was where nothing is left out.
        acceleration: the name of a preset, `exact`, `balanced` or `fast`; or settings.
        plan: which experts run where; a file of `afa prune`, or what is in it.

    Returns: the pipeline; of a single model, another one of the same class and parts.

    Raises:
        AfaError: no such preset or setting, a model that cannot be taken apart, or a plan of
            another ensemble, or of experts that are spread over processes.
    """
    if isinstance(plan, (str, Path)):
        plan = load_plan(Path(plan))
    settings, denoiser = acceleration_of(acceleration), denoiser_of(pipeline)
    if not isinstance(denoiser, EnsembleDenoiser):
        if settings.is_exact and plan is None:
            return pipeline
        denoiser = EnsembleDenoiser([denoiser], [Separate() for _ in discover_sites(denoiser)])
        parts = {**pipeline.components, kind_of_pipeline(pipeline).denoiser: denoiser}
        pipeline = build_pipeline(type(pipeline).__name__, parts, pipeline.config)
    if plan is not None:
        if denoiser.exchange is not None:
            raise AfaError("A pruning plan needs all experts in one process; these are spread.")
        plan.check(denoiser)
    denoiser.acceleration, denoiser.plan = settings, plan
    return pipeline
