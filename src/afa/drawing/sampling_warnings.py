"""Warnings of settings that draw poor pictures: the scheduler, the size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.scheduler_names import FOR_DISTILLED, split_name
from afa.denoisers.schedulers import name_of, scheduler_for
from afa.loading.task import native_resolution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from afa.drawing.recorded import PictureRecipe

#: a noise level (sigma) at which almost nothing of a picture is left; Stable Diffusion's largest
#: one is 14.6, and with zero terminal SNR diffusers has 4096
_NOISE_ALONE = 30
#: from what share of such steps on there is a warning
_SHARE = 1 / 4
#: the areas of pictures, by that of the experts' own size, which they may draw well
_SMALLEST, _LARGEST = 1 / 4, 3


def sampling_warnings(
    pipeline: DiffusionPipeline, recipes: Sequence[PictureRecipe], *, size_advice: str
) -> list[str]:
    """Warn of schedulers and sizes with which the experts draw poor pictures.

    Args:
        pipeline: draws the pictures.
        recipes: of the pictures.
        size_advice: how the size is set.

    Raises:
        AfaError: see `scheduler_for`.
    """
    asked = dict.fromkeys((each.scheduler, each.steps) for each in recipes)
    few = [name for name, _ in asked if name and split_name(name)[0] in FOR_DISTILLED]
    warnings = list[str]()
    if few and name_of(pipeline.scheduler) not in FOR_DISTILLED:
        warnings.append(
            f"The scheduler {few[0]} is for models that were distilled for few steps, and the "
            "experts' own is another one. Pictures of models without distillation are blurred."
        )
    noisy = (_of_noise(pipeline, name, steps) for name, steps in asked if name)
    warnings += [line for line in noisy if line]
    sizes = dict.fromkeys((each.height, each.width) for each in recipes)
    warnings += [line for size in sizes if (line := _of_size(pipeline, *size, size_advice))]
    return warnings


def _of_noise(pipeline: DiffusionPipeline, name: str, steps: int) -> str:
    """A warning if many steps are at noise levels that show nothing of a picture."""
    sampler, spacing = split_name(name)
    if not spacing:
        return ""
    scheduler = scheduler_for(pipeline, name)
    if not getattr(scheduler.config, "rescale_betas_zero_snr", False):
        return ""
    scheduler.set_timesteps(steps)
    lost = sum(1 for sigma in scheduler.sigmas[:-1].tolist() if sigma > _NOISE_ALONE)
    if lost <= steps * _SHARE:
        return ""
    return (
        f"The experts have zero terminal SNR, with which {name} spends {lost} of {steps} steps on "
        f"noise that shows nothing of the picture yet. Use the scheduler {sampler}, or more steps."
    )


def _of_size(pipeline: DiffusionPipeline, height: int, width: int, advice: str) -> str:
    """A warning if a size differs much from that of the experts' training pictures."""
    own = native_resolution(pipeline)
    ratio = height * width / (own[0] * own[1])
    if _SMALLEST <= ratio <= _LARGEST:
        return ""
    times = f"{ratio:.2g} times the area" if ratio < 1 else f"{ratio:.0f} times the area"
    what = "blurred" if ratio < 1 else "repeated objects"
    return (
        f"{width} x {height} pixels are {times} of the experts' own {own[1]} x {own[0]}, so "
        f"pictures may be poor ({what}). {advice}"
    )
