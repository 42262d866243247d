"""Replace the scheduler of a pipeline by another one with the experts' own noise schedule.

A scheduler of diffusers takes over the configuration of another one, but silently drops what its
class does not know, and fills in defaults that may be those of another noise schedule. Here,
what the model needs carries over, or the scheduler is refused.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.objective import FLOW, objective_of
from afa.denoisers.scheduler_names import (
    SAMPLERS,
    SPACINGS,
    calls_twice,
    canonical_name,
    split_name,
)
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffusers import DiffusionPipeline, SchedulerMixin

    from afa.denoisers.family import PipelineKind
    from afa.denoisers.objective import Objective

#: what determines the noise schedule; stated even where it is a class's default
_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
#: settings of a flow's time axis that only some classes have
_SHIFTS = ("use_dynamic_shifting", "shift_terminal")
#: settings of a flow's scheduler under which pictures differ, or mean something else
_OTHER_FLOWS = ("invert_sigmas", "stochastic_sampling")
#: the largest error of an angle of noise that rounded timesteps may make between two objectives
_ROUNDED = 2e-4
_PROBED = 20  # steps


def scheduler_names_for(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of all schedulers that fit a pipeline, without the rarer spacings."""
    names = [*SAMPLERS, *(f"{name}_karras" for name in SAMPLERS)]
    return [name for name in names if _fits(pipeline, name)]


def _fits(pipeline: DiffusionPipeline, name: str) -> bool:
    try:
        scheduler_for(pipeline, name)
    except AfaError:
        return False
    return True


def scheduler_for(pipeline: DiffusionPipeline, name: str) -> SchedulerMixin:
    """Make a scheduler for a pipeline, with the noise schedule of its own.

    Args:
        pipeline: the pipeline, whose scheduler is that of its model; it is not changed.
        name: see `afa.denoisers.scheduler_names.canonical_name`.

    Raises:
        AfaError: see `scheduler_from`; or if it does not fit the experts' different predictions or
            the settings of the ensemble.
    """
    made = scheduler_from(pipeline.scheduler, kind_of_pipeline(pipeline), name)
    objectives = getattr(denoiser_of(pipeline), "objectives", None)
    if objectives is not None:
        require_exact_timesteps(made, objectives.wanted, name)
    _require_settings(pipeline, name)
    return made


def scheduler_from(own: SchedulerMixin, kind: PipelineKind, name: str) -> SchedulerMixin:
    """Make a scheduler from that of a model, with its noise schedule.

    Prediction type, betas, zero terminal SNR, spacing of timesteps, their offset and shifts carry
    over, as with `from_config` in diffusers.

    Args:
        own: the model's.
        kind: of the model's pipeline.
        name: see `afa.denoisers.scheduler_names.canonical_name`.

    Raises:
        AfaError: if the name is unknown, or does not fit the model or its pipelines.
    """
    sampler, spacing = split_name(name)
    name, objective = canonical_name(name), objective_of(own)
    if objective is None or objective.predicts == "sample":
        raise AfaError(
            "AFA-DRAW-021",
            f"The experts' {type(own).__name__} has noise levels or a prediction type that other "
            f"schedulers do not have; got the scheduler {name}. Remove it to use their own.",
        )
    found, is_flow = SAMPLERS[sampler], objective.predicts == FLOW
    if is_flow:
        _require_flow(own.config, kind, sampler, spacing)
    if find_spec("scipy") is None and (spacing == "beta" or sampler == "lms"):
        raise AfaError(
            "AFA-DRAW-022",
            f"The scheduler {name} requires scipy, which is not installed. Run: pip install scipy",
        )
    class_name = (found.flow or "") if is_flow else found.diffusion
    made = _made(own, class_name, sampler, spacing, is_flow)
    if objective_of(made) != objective:
        raise AfaError(
            "AFA-DRAW-023",
            f"The scheduler {name} does not have the experts' noise schedule: its "
            f"{type(made).__name__} lacks what their {type(own).__name__} sets, such as zero "
            "terminal SNR. Use euler, ddim or dpmpp_2m, or their own scheduler.",
        )
    return made


@contextmanager
def sampled_with(pipeline: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Draw with another scheduler inside the block; None uses the pipeline's own.

    Raises:
        AfaError: see `scheduler_for`.
    """
    if name is None:
        yield
        return
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_for(pipeline, name)
    try:
        yield
    finally:
        pipeline.scheduler = own


def name_of(scheduler: SchedulerMixin) -> str:
    """Return the name of a scheduler, or of its class if it has none here."""
    config, found = scheduler.config, type(scheduler).__name__
    for name, sampler in SAMPLERS.items():
        changes = sampler.changes if found == sampler.diffusion else sampler.flow_changes
        if found not in (sampler.diffusion, sampler.flow):
            continue
        if all(config.get(key) in (value, None) for key, value in changes.items()):
            ends = [
                end
                for end, spacing in SPACINGS.items()
                if end != "sgm_uniform" and all(config.get(key) for key in spacing.changes)
            ]
            return "_".join([name, *ends])
    return found.removesuffix("Scheduler")


def _made(
    own: SchedulerMixin, class_name: str, sampler: str, spacing: str, is_flow: bool
) -> SchedulerMixin:
    """Make the scheduler from the configuration of a model's own."""
    import diffusers

    scheduler_class, config = getattr(diffusers, class_name), own.config
    taken = inspect.signature(scheduler_class.__init__).parameters
    kind = SAMPLERS[sampler]
    changes: dict[str, Any] = {
        key: False for each in SPACINGS.values() for key in each.changes if key.startswith("use_")
    }
    changes |= kind.flow_changes if is_flow else kind.changes
    if is_flow:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        changes |= {"shift": shift, "flow_shift": shift}
    else:
        changes |= {key: config[key] for key in _SCHEDULE if key in config}
        # a default of some classes, which is for pixels
        changes.setdefault("clip_sample", config.get("clip_sample", False))
    if spacing:
        unknown = [key for key in SPACINGS[spacing].changes if key not in taken]
        if unknown:
            ends = [e for e, s in SPACINGS.items() if all(key in taken for key in s.changes)]
            listed = ", ".join(f"{sampler}_{end}" for end in ends)
            raise AfaError(
                "AFA-DRAW-024",
                f"The scheduler {sampler} cannot be combined with the spacing {spacing}. Use "
                f"{sampler}{', ' if listed else ''}{listed}.",
            )
        changes |= SPACINGS[spacing].changes
    given = {key: value for key, value in changes.items() if key in taken}
    return scheduler_class.from_config(config, **given)


def _require_flow(
    config: Mapping[str, Any], kind: PipelineKind, sampler: str, spacing: str
) -> None:
    """Check that a sampler is one for flow matching, and follows the model's shifts.

    Raises:
        AfaError: if not; it names those that do.
    """
    other = next((key for key in _OTHER_FLOWS if config.get(key)), None)
    if other is not None:
        raise AfaError(
            "AFA-DRAW-025",
            f"The experts' scheduler has {other}, which other schedulers lack; got the scheduler "
            f"{sampler}. Remove it to use their own.",
        )
    is_shifted = any(config.get(key) for key in _SHIFTS)
    is_linear = config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear"
    fitting = [
        name
        for name in kind.flow_samplers
        if name == "euler" or not (is_linear or (is_shifted and not SAMPLERS[name].shifts))
    ]
    if sampler not in fitting or (spacing and sampler != "euler"):
        asked = f"{sampler}_{spacing}" if spacing else sampler
        raise AfaError(
            "AFA-DRAW-026",
            f"The scheduler {asked} does not fit these experts, which predict a flow (a "
            f"{kind.name} pipeline). Use {' or '.join(fitting)}, or their own scheduler.",
        )


def require_exact_timesteps(scheduler: SchedulerMixin, wanted: Objective, name: str) -> None:
    """Check that timesteps are not rounded, for experts whose predictions are converted at these.

    Args:
        scheduler: to be used.
        wanted: what the ensemble predicts.
        name: of the scheduler.

    Raises:
        AfaError: if they are.
    """
    if _error_of_timesteps(scheduler, wanted) > _ROUNDED:
        raise AfaError(
            "AFA-DRAW-027",
            f"The scheduler {name} calls the experts with rounded timesteps, but these experts "
            "predict different quantities, which are converted at the exact noise level. Use "
            "euler, euler_a, ddim or dpmpp_2m.",
        )


def _error_of_timesteps(scheduler: SchedulerMixin, objective: Objective) -> float:
    """The largest difference of a step's noise level, as an angle, from that of its timestep."""
    scheduler.set_timesteps(_PROBED)
    sigmas, steps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    if sigmas is None or len(sigmas) < len(steps):  # noise levels of its timesteps by definition
        return 0.0
    sigmas = torch.as_tensor(sigmas)[: len(steps)].double()
    signal = 1 - sigmas if objective.predicts == FLOW else torch.ones_like(sigmas)
    return float((objective.angle(steps) - torch.atan2(sigmas, signal)).abs().max())


def _require_settings(pipeline: DiffusionPipeline, name: str) -> None:
    """Check a sampler with two calls per step against what counts on one.

    Raises:
        AfaError: if the ensemble reuses earlier steps, or records steps as CUDA graphs.
    """
    denoiser = denoiser_of(pipeline)
    reuses = not getattr(getattr(denoiser, "acceleration", None), "is_exact", True)
    graphs = getattr(denoiser, "graphs", None) is not None
    if calls_twice(name) and (reuses or graphs):
        what = "CUDA graphs" if graphs else "a feature cache (--speed)"
        raise AfaError(
            "AFA-DRAW-028",
            f"The scheduler {name} calls the experts twice in a step, which cannot be combined "
            f"with {what}. Switch that off, or use another scheduler, such as dpmpp_2m.",
        )
