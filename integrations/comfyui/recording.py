"""The fusion weights of sampled latents, for AFA Weights."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from afa.ensemble.recording import RecordedStep, WeightRecord, observed
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from afa.ensemble.denoiser import EnsembleDenoiser

#: latents of which the weights are kept
_NUM_KEPT = 4
#: of the positive prompt among ComfyUI's conditions
_POSITIVE = 0


@dataclass
class Seen:
    """The fusion weights of one sampling, and the latent that it returned."""

    record: WeightRecord = field(default_factory=WeightRecord)
    latent: Tensor | None = None


class Recording:
    """The fusion weights of the last samplings."""

    def __init__(self) -> None:
        self._kept: list[Seen] = []
        self._current: Seen | None = None

    @contextmanager
    def of_latent(self) -> Iterator[Seen]:
        """Record the sampling inside the block."""
        self._current = seen = Seen()
        try:
            yield seen
        finally:
            self._current = None
        self._kept = [*self._kept, seen][-_NUM_KEPT:]

    def of_call(
        self, denoiser: EnsembleDenoiser, options: Mapping[str, Any], records: bool
    ) -> AbstractContextManager[None]:
        """Record one call of the denoiser: the weights for the positive prompt.

        Calls for a negative prompt alone are not recorded.
        """
        conditions: list[int] = options.get("cond_or_uncond", [_POSITIVE])
        if self._current is None or not records or _POSITIVE not in conditions:
            return nullcontext()
        step = RecordedStep(float("nan"))
        self._current.record.steps.append(step)
        position = conditions.index(_POSITIVE)

        def observe(timesteps: Tensor, site: str, weights: Tensor) -> None:
            step.timestep = float(timesteps.flatten()[0])
            own = weights.detach().chunk(len(conditions))[position]
            step.weights[site] = own.to("cpu", torch.float16, copy=True)

        return observed(denoiser, observe)

    def of(self, latent: Tensor) -> WeightRecord:
        """The weights with which a latent was drawn.

        Raises:
            AfaError: if it is none of the last latents.
        """
        for seen in reversed(self._kept):
            if seen.latent is not None and _equal(seen.latent, latent):
                return seen.record
        raise AfaError(
            "AFA-COMFY-012",
            "No fusion weights of this latent are recorded. Connect the MODEL of AFA Weights to "
            "the sampler, and the sampler's LATENT to AFA Weights.",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu()
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))
