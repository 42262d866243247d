"""The hook that adds noise to the prompt which fusion rules see, while they are trained.

The experts see the prompt as it is. So aggregators learn from what the text embeddings of many
words have in common, and not from single words, and can route words that their training data lack.
To add noise to the inputs of a linear layer is to penalise its weights (Bishop, 1995, "Training
with noise is equivalent to Tikhonov regularization").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.ensemble.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from afa.aggregators import Condition
    from afa.ensemble.hook import Inputs


class PromptNoise(Hook):
    """Add Gaussian noise to the text embedding in the condition; it is the same at all sites.

    Args:
        level: standard deviation of the noise, by that of the sample's text embedding.
        seeds: one per sample of the batch, so that a sample's noise does not depend on the batch.
    """

    def __init__(self, level: float, seeds: Sequence[int]) -> None:
        self._level, self._seeds = level, seeds
        self._noisy: Tensor | None = None

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Forget the text of an earlier step."""
        del inputs
        self._noisy = None
        return ()

    def condition(self, site: str, condition: Condition) -> Condition:
        """Replace the text [B, L, D] by a noisy one."""
        del site
        if condition.text is None:
            return condition
        if self._noisy is None:
            self._noisy = self._with_noise(condition.text)
        return condition._replace(text=self._noisy)

    def _with_noise(self, text: Tensor) -> Tensor:
        deviation = text.float().std((1, 2), keepdim=True)
        noise = torch.stack([_normal(text.shape[1:], seed) for seed in self._seeds])
        return text + (self._level * deviation * noise.to(text.device)).to(text.dtype)


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers, drawn on the CPU and so equal on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
