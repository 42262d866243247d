"""The fusion weights of sampled latents, for AFA Weights."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from afa.ensemble.recording import RecordedStep, WeightRecord, observed
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from afa.ensemble.denoiser import EnsembleDenoiser

#: latents whose weights are kept
NUM_KEPT = 4


@dataclass
class Seen:
    """The fusion weights of one sampling, and the latent that it returned.

    Attributes:
        positive: ComfyUI's identities of the conditions of the positive prompt.
        size: height and width of the latent.
        steps: by noise level, the sum of the weights by site, and the conditions in it.
        latent: what the sampler returned, on the CPU.
    """

    positive: Collection[Any]
    size: tuple[int, ...]
    steps: dict[float, tuple[dict[str, Tensor], set[Any]]] = field(default_factory=dict)
    latent: Tensor | None = None

    def asked(self, options: Mapping[str, Any], sample: Tensor) -> dict[int, Any]:
        """The parts of a call's batch to record: their positions, and their conditions.

        Only conditions of the positive prompt for the whole picture are recorded, at their first
        call of a step; guidance methods call the denoiser again with other patches.
        """
        if tuple(sample.shape[-2:]) != self.size:
            return {}
        return {
            position: condition
            for position, condition in enumerate(options.get("uuids", ()))
            if condition in self.positive
        }

    def record(self) -> WeightRecord:
        """The weights of every step; of several conditions, their mean."""
        return WeightRecord(
            [
                RecordedStep(step, {site: total / len(seen) for site, total in sums.items()})
                for step, (sums, seen) in self.steps.items()
            ]
        )


def positive_in(guider: Any) -> set[Any]:
    """ComfyUI's identities of the conditions of a guider's positive prompt."""
    return {condition["uuid"] for condition in guider.conds.get("positive", ())}


class Recording:
    """The fusion weights of the last samplings."""

    def __init__(self) -> None:
        self._kept: list[Seen] = []
        self._current: Seen | None = None

    @contextmanager
    def of_latent(self, positive: Collection[Any], noise: Tensor) -> Iterator[Seen]:
        """Record the sampling inside the block.

        Args:
            positive: see `positive_in`.
            noise: the noise [B, C, H, W] of the sampling, for the size.
        """
        self._current = seen = Seen(positive, tuple(noise.shape[-2:]))
        try:
            yield seen
        finally:
            self._current = None
        self._kept = [*self._kept, seen][-NUM_KEPT:]

    def of_call(
        self, denoiser: EnsembleDenoiser, options: Mapping[str, Any], call: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Record one call of the denoiser, if it is to be recorded."""
        if self._current is None:
            return nullcontext()
        step = float(call["timestep"].flatten()[0])
        sums, known = self._current.steps.get(step, ({}, set()))
        asked = self._current.asked(options, call["sample"])
        new = {position: each for position, each in asked.items() if each not in known}
        if not new:
            return nullcontext()
        self._current.steps[step] = sums, known
        known.update(new.values())
        count = len(options["uuids"])

        def observe(timesteps: Tensor, site: str, weights: Tensor) -> None:
            del timesteps
            chunks = weights.detach().chunk(count)
            for position in new:
                own = chunks[position].to("cpu", torch.float32, copy=True)
                sums[site] = sums[site] + own if site in sums else own

        return observed(denoiser, observe)

    def of(self, latent: Tensor) -> WeightRecord:
        """The weights with which a latent was drawn.

        Raises:
            AfaError: if it is none of the last latents, or if no call of its sampling was recorded.
        """
        for seen in reversed(self._kept):
            if seen.latent is None or not _equal(seen.latent, latent):
                continue
            if not seen.steps:
                raise AfaError(
                    "AFA-COMFY-035",
                    "This latent has no fusion weights of its positive prompt: all conditions are "
                    "for areas of the picture, or the guider names no positive prompt. Use a "
                    "prompt for the whole picture.",
                )
            return seen.record()
        raise AfaError(
            "AFA-COMFY-012",
            f"No fusion weights of this latent are recorded; the last {NUM_KEPT} latents of a "
            "MODEL are. Switch on record_weights, connect the MODEL of AFA Weights to the sampler, "
            "and the sampler's LATENT to AFA Weights.",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu()
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))
