"""Pictures are drawn to see who is listened to where; a plan is what comes of it."""

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
    """Draw a picture of every prompt and add up the fusion weights.

    Args:
        pipeline: with an ensemble.
        prompts: like those that the plan is for.
        num_steps: denoising steps.
        num_ranges: parts of the noise levels that are told apart.
        batch_size: pictures at a time.
        seed: of the noise.
        call: more of the pipeline's arguments, as `guidance_scale`.

    Yields: how many pictures are done.

    Returns: the shares, from which plans are made.
    """
    ensemble, kind = denoiser_of(pipeline), kind_of_pipeline(pipeline)
    count = pipeline.scheduler.config.num_train_timesteps
    highest = highest_timestep(kind.family, count)
    shares = Shares(ensemble, num_ranges, highest)
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        with observed(ensemble, shares.note):  # in whichever thread asks for the next batch
            pipeline(
                chosen,
                num_inference_steps=num_steps,
                generator=[
                    torch.Generator().manual_seed(seed + start + n) for n in range(len(chosen))
                ],
                output_type="latent",
                **{**kind.call, **call},
            )
        yield start + len(chosen)
    return shares
