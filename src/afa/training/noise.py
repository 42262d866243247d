"""Noise on the prompt that aggregators see in a step of their training."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from afa.aggregators import SABW
from afa.ensemble.prompt_noise import PromptNoise
from afa.errors import AfaError
from afa.loading.predictions import fused_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afa.ensemble.denoiser import EnsembleDenoiser


def require_noise(ensemble: EnsembleDenoiser, level: float) -> None:
    """Check that all that aggregators see of the prompt gets noise, and that they see it.

    Raises:
        AfaError: if the timestep embedding contains the prompt, or no aggregator sees the prompt.
    """
    if not level:
        return
    configs = [rule.config for rule in ensemble.aggregators if isinstance(rule, SABW)]
    # predictions are fused with an embedding of the noise level alone
    is_pooled = bool(ensemble.widths.pooled) and fused_by(ensemble) == "blocks"
    if is_pooled and any(config.timestep for config in configs):
        raise AfaError(
            "AFA-TRAIN-059",
            "training.prompt_noise has no effect on the pooled prompt, which is part of these "
            "experts' timestep embeddings. Remove it, or set aggregator.timestep: false.",
        )
    if not any(config.prompt for config in configs):
        raise AfaError(
            "AFA-TRAIN-060",
            "training.prompt_noise needs aggregators that see the prompt. Remove it, or "
            "aggregator.prompt: false.",
        )


@contextmanager
def noise_on_prompt(
    ensemble: EnsembleDenoiser, level: float, seeds: Sequence[int]
) -> Iterator[None]:
    """Add noise to the prompt that the fusion rules see in calls inside the block.

    Args:
        ensemble: the ensemble.
        level: see `PromptNoise`; 0 adds none.
        seeds: see `PromptNoise`.
    """
    ensemble.prompt_noise = PromptNoise(level, seeds) if level else None
    try:
        yield
    finally:
        ensemble.prompt_noise = None
