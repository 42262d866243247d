"""A denoiser as a coroutine: it yields its feature at every site and takes back what goes on."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

from torch import Tensor


class Feature(NamedTuple):
    """What a denoiser has computed at a site.

    `hidden` is [B, C, H, W], or None where the site was to be skipped; `temb` [B, T] is the
    embedded timestep that conditions its layers.
    """

    site: str
    hidden: Any
    temb: Tensor


#: yields features, is sent the feature to go on with, returns the prediction
Blocks = Generator[Feature, Tensor, Tensor]


def run_alone(blocks: Blocks) -> Tensor:
    """Send every feature straight back: the denoiser's own forward pass."""
    return run_lockstep([blocks], lambda features: features[0].hidden)


def run_lockstep(
    experts: Sequence[Blocks],
    fuse: Callable[[Sequence[Feature]], Tensor | Sequence[Tensor]],
) -> Tensor:
    """Run several denoisers side by side and fuse their features at every site.

    Args:
        experts: coroutines of one architecture, freshly made.
        fuse: called at each site with one feature per expert; answers with one tensor for all of
            them to go on with, or with a sequence of one per expert.

    Returns: the first expert's prediction, which is the fused one if `fuse` answered with one
        tensor at the last site.
    """
    features = [next(expert) for expert in experts]
    while True:
        fused = fuse(features)
        sent = [fused] * len(experts) if isinstance(fused, Tensor) else fused
        features, results = [], []
        for expert, hidden in zip(experts, sent, strict=True):
            try:
                features.append(expert.send(hidden))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            return results[0]
