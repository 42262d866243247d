"""Recorded fusion weights: who holds which place at which step; `afa.drawing.plots` draws them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from afa.denoisers.tokens import TEXT
from afa.ensemble.observation import Observation
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from afa.ensemble.observation import WeightsObserver
    from afa.ensemble.protocol import Ensemble


@dataclass
class RecordedStep:
    """The fusion weights of one call of the denoiser: site -> [B, N, H, W], on the CPU."""

    timestep: float
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class WeightRecord:
    """The fusion weights of a whole run, one entry per call of the denoiser.

    With classifier-free guidance the batch holds the unconditional half first, then the prompts.
    """

    steps: list[RecordedStep] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """The sites whose weights have a place in the picture; a text's have none."""
        return [site for site in self.steps[0].weights if not site.endswith(TEXT)]

    def mean_map(self, step: int | None, size: int, site: str | None = None) -> Tensor:
        """Weights averaged over the picture's sites, [B, N, size, size].

        Every site counts the same, and every step; maps are enlarged to `size` pixels first.

        Args:
            step: by number; None averages over all.
            size: of a side.
            site: one alone.
        """
        steps = self.steps if step is None else [self.steps[step]]
        sites = self.places if site is None else [site]
        maps = (
            F.interpolate(
                each.weights[name].float(), (size, size), mode="bilinear", align_corners=False
            )
            for each in steps
            for name in sites
        )
        return sum(maps, start=torch.zeros(())) / (len(steps) * len(sites))

    def last(self, count: int = 1) -> WeightRecord:
        """Of the last entries of every batch alone, the prompted ones, in half precision."""
        return WeightRecord(
            [
                RecordedStep(step.timestep, {s: w[-count:].half() for s, w in step.weights.items()})
                for step in self.steps
            ]
        )

    def mean_share(self) -> Tensor:
        """Mean weight by step, site and expert, [steps, sites, N]."""
        return torch.stack(
            [
                torch.stack([w.float().mean((0, 2, 3)) for w in step.weights.values()])
                for step in self.steps
            ]
        )


@contextmanager
def record_weights(ensemble: Ensemble) -> Iterator[WeightRecord]:
    """Collect the fusion weights of every step and site while the block runs.

        with afa.record_weights(pipeline.unet) as record:
            pipeline("a fox")

    Nothing is kept outside of the block, nor of pictures that other threads draw meanwhile.
    """
    record = WeightRecord()
    first_site = ensemble.sites[0].name

    def observe(timestep: Tensor, site: str, weights: Tensor) -> None:
        if not record.steps or site == first_site or site in record.steps[-1].weights:
            record.steps.append(RecordedStep(float(timestep.flatten()[0])))
        record.steps[-1].weights[site] = weights.detach().to("cpu", copy=True)

    with observed(ensemble, observe):
        yield record


@contextmanager
def observed(
    ensemble: Ensemble, observer: WeightsObserver, *, immediately: bool = False
) -> Iterator[None]:
    """Call an observer with the fusion weights of every site while the block runs.

    Observers of other blocks are called as well. It sees the calls of its own thread: pictures that
    other threads draw with the same ensemble are not its own.

    Args:
        ensemble: whose weights are seen.
        observer: see `WeightsObserver`.
        immediately: call it at every site, even of a step that is computed once more since its
            prediction is not finite; otherwise at the end of every call.

    Raises:
        AfaError: at the end, if other threads alone have drawn.
    """
    observation = Observation(observer, immediately)
    ensemble.observers.append(observation)
    try:
        yield
    finally:
        ensemble.observers.remove(observation)
    if observation.num_foreign and not observation.num_own:
        raise AfaError(
            "AFA-ENSEMBLE-048",
            "Fusion weights are seen of pictures that are drawn in the thread that asks for them; "
            "here another thread has drawn, and nothing was seen. Enter afa.record_weights in the "
            "thread that calls the pipeline.",
        )
