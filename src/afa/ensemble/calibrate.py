"""Measure average fusion weights on sample pictures, from which pruning plans are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.timesteps import highest_timestep
from afa.ensemble.caching.plan import Shares
from afa.ensemble.recording import observed

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from diffusers import DiffusionPipeline


def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_steps: int = 20,
    num_ranges: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    **call: Any,
) -> Generator[int, None, Shares]:
    """Draw a picture of every prompt and average the fusion weights.

    Args:
        pipeline: a pipeline with an ensemble.
        prompts: prompts like those for which the plan will be used.
        num_steps: the number of denoising steps.
        num_ranges: the number of timestep ranges with averages of their own.
        batch_size: pictures per call of the pipeline.
        seed: the seed of the first picture's noise; the others follow.
        call: further arguments of the pipeline's call, such as `guidance_scale`;
            `negative_prompt` is one for all.

    Yields: the number of finished pictures.

    Returns: the average fusion weights; `Shares.plan` makes a plan from them.
    """
    ensemble, kind = denoiser_of(pipeline), kind_of_pipeline(pipeline)
    count = pipeline.scheduler.config.num_train_timesteps
    highest = highest_timestep(kind.family, count)
    shares = Shares(ensemble, num_ranges, highest)
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        negative = {k: [v] * len(chosen) for k, v in call.items() if k == "negative_prompt"}
        with observed(ensemble, shares.note):  # entered per batch: the calling thread may change
            pipeline(
                prompt=chosen,
                num_inference_steps=num_steps,
                generator=[
                    torch.Generator().manual_seed(seed + start + n) for n in range(len(chosen))
                ],
                output_type="latent",
                **{**kind.call, **call, **negative},
            )
        yield start + len(chosen)
    return shares
