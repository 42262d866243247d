"""How well a model recognises a prompt in each region of a picture.

A diffusion model is a classifier: a prompt fits a picture if the model predicts the picture's noise
better with the prompt than without it (Li et al., 2023, arXiv 2303.16203). The difference of the
errors, summed over noise levels, estimates the pointwise mutual information of picture and prompt,
and it is a sum over pixels (Kong et al., 2023, arXiv 2310.07972, section 3). So it also says where
the prompt fits. A model recognises much that it draws badly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor


@torch.no_grad()
def recognise(
    judge: DiffusionPipeline,
    latents: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_levels: int = 5,
) -> Tensor:
    """Compare the errors of a model's predictions without and with prompt, in every pixel.

    Every level has the same noise with both signs. The difference of the errors has a term that is
    linear in the noise, has the mean 0, and would hide the rest; so most of it cancels. A picture's
    noise depends on its seed alone, so that drafts of several experts can be compared.

    Args:
        judge: pipeline of the model.
        latents: [B, C, H, W], as the denoiser sees them.
        prompts: B prompts.
        seeds: B seeds of the noise.
        num_levels: number of noise levels, evenly distributed over those of the model's training.

    Returns: [B, levels, H, W] in float32 on the CPU, in squared units of the prediction; positive
        where the prompt fits.

    Raises:
        AfaError: if the model does not draw from prompts, or its noise levels are continuous.
    """
    conditioning, model = conditioning_of(judge), denoiser_of(judge)
    process = forward_process(judge.scheduler)
    batch, _, height, width = latents.shape
    given = conditioning.encode(judge, [*prompts, *[""] * batch])
    factor = judge.vae_scale_factor
    side = torch.tensor([height * factor, width * factor, 0, 0, height * factor, width * factor])
    conditions: dict[str, Any] = {**given, "sizes": side.repeat(2 * batch, 1).to(model.device)}
    latents = latents.to(model.device).float()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = []
    for level in range(num_levels):
        time = torch.full((batch,), (level + 0.5) / num_levels, dtype=torch.float64)
        timestep = process.timesteps(time).to(model.device)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        noise = noise.to(latents)
        both = []
        for signed in (noise, -noise):
            noisy, target = process.noisy_and_target(latents, signed, timestep)
            predicted = conditioning.predict(
                judge, model, noisy.repeat(2, 1, 1, 1), timestep.repeat(2), conditions=conditions
            )
            error = (predicted.float() - target.repeat(2, 1, 1, 1)).square().mean(1)
            both.append(error[batch:] - error[:batch])
        found.append((both[0] + both[1]) / 2)
    return torch.stack(found, 1).cpu()
