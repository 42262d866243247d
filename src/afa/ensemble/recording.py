"""Record the fusion weights of every step and site; `afa.drawing.plots` plots them."""

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
    """The fusion weights of one denoiser call, by site: [B, N, H, W] on the CPU."""

    timestep: float
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class WeightRecord:
    """The fusion weights of a run, one entry per denoiser call.

    With classifier-free guidance the first half of the batch is unconditional.
    """

    steps: list[RecordedStep] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """The sites with weights per pixel: all but those of a text stream."""
        return [site for site in self.steps[0].weights if not site.endswith(TEXT)]

    def mean_map(self, step: int | None, size: int, site: str | None = None) -> Tensor:
        """Average the weight maps over sites and steps, each enlarged to [B, N, size, size] first.

        Args:
            step: the number of one step; None averages over all steps.
            size: height and width of the maps, in pixels.
            site: the name of one site; None averages over all sites but those of a text.
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
        """Keep only the last `count` (conditional) batch entries of every step, in float16."""
        return WeightRecord(
            [
                RecordedStep(step.timestep, {s: w[-count:].half() for s, w in step.weights.items()})
                for step in self.steps
            ]
        )

    def mean_share(self) -> Tensor:
        """Average fusion weight by step, site and expert, [steps, sites, N]."""
        return torch.stack(
            [
                torch.stack([w.float().mean((0, 2, 3)) for w in step.weights.values()])
                for step in self.steps
            ]
        )


@contextmanager
def record_weights(ensemble: Ensemble) -> Iterator[WeightRecord]:
    """Record the fusion weights of every step and site while the `with` block runs.

        with afa.record_weights(pipeline.unet) as record:
            pipeline("a fox")

    It records only pictures that are drawn inside the block by the same thread.

    Raises:
        AfaError: at the end of the block, if only other threads have drawn.
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
    """Call an observer with the fusion weights of every site while the `with` block runs.

    It is called only for pictures that are drawn in this thread. Several observers can be active.

    Args:
        ensemble: the ensemble to observe.
        observer: see `WeightsObserver`.
        immediately: call it at every site, also of a step that is repeated because its prediction
            is not finite; otherwise once at the end of every denoiser call.

    Raises:
        AfaError: at the end of the block, if only other threads have drawn.
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
            "No fusion weights were recorded, because only other threads called the ensemble. "
            "Enter afa.record_weights in the thread that calls the pipeline.",
        )
