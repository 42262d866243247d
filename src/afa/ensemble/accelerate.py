"""Any pipeline, faster: an ensemble or a single model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.aggregators import Separate
from afa.denoisers import discover_sites
from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.caching.graphs import Graphs
from afa.ensemble.caching.plan import PruningPlan, load_plan
from afa.ensemble.caching.settings import EXACT, Acceleration, acceleration_of
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline


def accelerate(
    pipeline: DiffusionPipeline,
    acceleration: str | Mapping[str, Any] | Acceleration = EXACT,
    *,
    plan: PruningPlan | str | Path | None = None,
    compile: Literal["regional"] | None = None,
    cuda_graphs: bool = False,
) -> DiffusionPipeline:
    """Make a pipeline faster: leave out a part of what it computes, compile it, launch it at once.

        pipeline = afa.accelerate(afa.load_ensemble("zoo:ensemble"), "fast")

    Args:
        pipeline: with an ensemble, whose settings are changed in place; or with a single model,
            which then is an ensemble of one, and exactly what it was where nothing is left out.
        acceleration: the name of a preset, `exact`, `balanced` or `fast`; or settings.
        plan: which experts run where; a file of `afa prune`, or what is in it.
        compile: `regional`, the blocks of experts and aggregators are compiled at the first step,
            which takes from half a minute to some minutes; None leaves them as they are.
        cuda_graphs: the second step of every denoising loop is recorded, and the later ones are
            replayed: bit for bit the same, without the time that Python takes to launch a step. For
            GPUs that wait for it, as they do where models, pictures and batches are small; takes
            the memory of a step besides. Steps that something looks into, such as
            `afa.record_weights`, or that are computed in part, run as they are.

    Returns: the pipeline; of a single model, another one of the same class and parts.

    Raises:
        AfaError: no such preset or setting, a model that cannot be taken apart, a plan of another
            ensemble, or of experts that are spread over processes, nothing to compile with, or no
            CUDA device.
    """
    if isinstance(plan, (str, Path)):
        plan = load_plan(Path(plan))
    settings, denoiser = acceleration_of(acceleration), denoiser_of(pipeline)
    if not isinstance(denoiser, EnsembleDenoiser):
        if settings.is_exact and plan is None and compile is None and not cuda_graphs:
            return pipeline
        denoiser = EnsembleDenoiser([denoiser], [Separate() for _ in discover_sites(denoiser)])
        parts = {**pipeline.components, kind_of_pipeline(pipeline).denoiser: denoiser}
        bar = getattr(pipeline, "_progress_bar_config", None)
        pipeline = build_pipeline(type(pipeline).__name__, parts, pipeline.config)
        pipeline.set_progress_bar_config(**bar or {})
    if cuda_graphs and not torch.cuda.is_available():
        raise AfaError(
            "AFA-ENSEMBLE-001", "CUDA graphs need a CUDA device; torch finds none. Leave them out."
        )
    if compile is not None:
        _require_compiler(compile, denoiser.device.type)
    before = denoiser.plan, denoiser.graphs
    denoiser.plan = denoiser.graphs = None
    try:
        denoiser.plan, denoiser.graphs = plan, Graphs() if cuda_graphs else None
    except AfaError:
        denoiser.plan = denoiser.graphs = None
        denoiser.plan, denoiser.graphs = before
        raise
    denoiser.acceleration = settings
    if compile is not None:
        denoiser.compile_repeated_blocks()
    return pipeline


def _require_compiler(mode: str, device: str) -> None:
    """Raise AfaError where there is no such mode, or no C++ compiler and a processor to run on."""
    if mode != "regional":
        raise AfaError("AFA-ENSEMBLE-002", f"compile must be 'regional' or None, came {mode!r}.")
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise AfaError(
            "AFA-ENSEMBLE-003",
            "To compile for the processor there must be a C++ compiler; none was found as $CXX, "
            "g++ or clang++. Install g++, or leave compiling out.",
        )
