"""Noise on the prompt that aggregators see in a step of their training."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from afa.ensemble.prompt_noise import PromptNoise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afa.ensemble.denoiser import EnsembleDenoiser


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
