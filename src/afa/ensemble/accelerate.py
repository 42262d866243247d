"""`accelerate`: make a pipeline faster, with an ensemble or a single model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.alone import in_shell
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
    """Make a pipeline faster with a feature cache, a pruning plan, compilation or CUDA graphs.

        pipeline = afa.accelerate(afa.load_ensemble("zoo:ensemble"), "fast")

    Args:
        pipeline: a pipeline with an ensemble, whose settings are changed in place; or with a single
            model, which becomes an ensemble of one and computes the same unless a cache is used.
        acceleration: settings of the feature cache, or the name of a preset: `exact`, `balanced` or
            `fast`. Presets reuse predictions if these alone are fused.
        plan: a pruning plan, or the file that `afa prune` wrote: which experts run at which sites
            and steps.
        compile: `regional` compiles the blocks of experts and aggregators at the first step, which
            takes from half a minute to some minutes; None does not compile.
        cuda_graphs: record the second step of every denoising loop and replay it for later steps.
            The result is the same bit for bit, without the time that Python needs to launch a step.
            It helps where models, pictures or batches are small, and needs the memory of one more
            step. Steps with an observer, such as `afa.record_weights`, and steps that the cache
            computes in part are not recorded.

    Returns: the pipeline; for a single model, a new pipeline of the same class and parts.

    Raises:
        AfaError: if the preset or a setting is unknown, the model's family is not supported, the
            plan was made for another ensemble, a feature excludes another, or the C++ compiler or
            the CUDA device is missing.
    """
    if isinstance(plan, (str, Path)):
        plan = load_plan(Path(plan))
    settings, denoiser = acceleration_of(acceleration), denoiser_of(pipeline)
    if not isinstance(denoiser, EnsembleDenoiser):
        if settings.is_exact and plan is None and compile is None and not cuda_graphs:
            return pipeline
        denoiser = in_shell(denoiser)
        parts = {**pipeline.components, kind_of_pipeline(pipeline).denoiser: denoiser}
        bar = getattr(pipeline, "_progress_bar_config", None)
        pipeline = build_pipeline(type(pipeline).__name__, parts, pipeline.config)
        pipeline.set_progress_bar_config(**bar or {})
    if cuda_graphs and not torch.cuda.is_available():
        raise AfaError(
            "AFA-ENSEMBLE-001",
            "CUDA graphs need a CUDA device, and torch finds none. Do not use CUDA graphs here.",
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
    """Check the mode and, for the CPU, that there is a C++ compiler."""
    if mode != "regional":
        raise AfaError("AFA-ENSEMBLE-002", f"compile must be 'regional' or None; got {mode!r}.")
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")  # cl: Microsoft's
    if device == "cpu" and not any(map(shutil.which, compilers)):
        raise AfaError(
            "AFA-ENSEMBLE-003",
            "Compiling for the CPU needs a C++ compiler; none was found as $CXX, g++ or clang++. "
            "Install g++, or do not compile.",
        )
