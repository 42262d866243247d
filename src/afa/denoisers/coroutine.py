"""Denoisers as coroutines: yield the feature of every site, continue with the one sent back."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

from torch import Tensor

from afa.errors import AfaError


class Feature(NamedTuple):
    """The feature that a denoiser computed at a site.

    `hidden` is [B, C, H, W], or None if the site is skipped. `temb` [B, T] is the timestep
    embedding that conditions the layers.
    """

    site: str
    hidden: Any
    temb: Tensor


#: yields features, receives the feature to continue with, returns the prediction
Blocks = Generator[Feature, Tensor, Tensor]


def run_alone(blocks: Blocks) -> Tensor:
    """Run one denoiser and send every feature back unchanged; equals its own forward pass."""
    return run_lockstep([blocks], lambda features: features[0].hidden)


def run_lockstep(
    experts: Sequence[Blocks],
    fuse: Callable[[Sequence[Feature]], Tensor | Sequence[Tensor]],
) -> Tensor:
    """Run several denoisers in lockstep and fuse their features at every site (AFA, section 3.2).

    Args:
        experts: newly created coroutines of one architecture.
        fuse: called at every site with one feature per expert. It returns one tensor [B, C, H, W]
            with which all experts continue, or a sequence with one tensor per expert.

    Returns: the first expert's prediction. It is the fused prediction if `fuse` returned one tensor
        at the last site.

    Raises:
        AfaError: if the experts are not at one site, because the blocks of one of them were
            replaced.
    """
    features = [next(expert) for expert in experts]
    while True:
        _require_one_site(features)
        fused = fuse(features)
        sent = [fused] * len(experts) if isinstance(fused, Tensor) else fused
        features, results = [], []
        for expert, hidden in zip(experts, sent, strict=True):
            try:
                features.append(expert.send(hidden))
            except StopIteration as stop:
                results.append(stop.value)
        if len(results) == len(experts):
            return results[0]
        if results:
            raise _out_of_step(f"{len(results)} of {len(experts)} have no further site")


def _require_one_site(features: Sequence[Feature]) -> None:
    for feature in features[1:]:
        if feature.site != features[0].site:
            raise _out_of_step(f"one is at '{features[0].site}', another at '{feature.site}'")


def _out_of_step(what: str) -> AfaError:
    return AfaError(
        "AFA-MODEL-020",
        f"The experts have different blocks: {what}. Use experts of one architecture, and undo "
        "what has changed the blocks of one of them.",
    )
