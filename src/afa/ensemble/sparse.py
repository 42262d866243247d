"""Run only the experts with the largest weights, chosen anew every few steps of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import Tensor

    from afa.ensemble.denoiser import EnsembleDenoiser


class LeadingExperts:
    """A schedule: at every few steps all experts run, and then those with the largest weights.

    The weights are averaged over sites and pixels, and over the batch: draw one picture at a time
    to choose for each picture.

    Args:
        num_experts: N.
        count: number of experts that run between these steps.
        every: all experts run at every `every`-th step, beginning with the first one.
    """

    def __init__(self, num_experts: int, count: int, every: int) -> None:
        self.num_experts, self.count, self.every = num_experts, count, every
        self._last: float | None = None
        self._number = 0
        self._sums: list[float] = []
        self._chosen = list(range(num_experts))

    def __call__(self, timestep: float) -> list[int]:
        """Return the numbers of the experts that run at a timestep."""
        is_next = timestep != self._last  # each half of guidance may be a call of its own
        if self._last is None or timestep > self._last:  # of a new picture
            self._number = 0
        elif is_next:
            self._number += 1
        self._last = timestep
        if self._number % self.every == 0:
            if is_next:
                self._sums = [0.0] * self.num_experts
            return list(range(self.num_experts))
        if self._sums:
            order = sorted(range(self.num_experts), key=lambda n: -self._sums[n])
            self._chosen, self._sums = sorted(order[: self.count]), []
        return self._chosen

    def observe(self, timesteps: Tensor, site: str, weights: Tensor) -> None:
        """Add the weights [B, N, H, W] of a site, if all experts run."""
        del timesteps, site
        if self._sums:
            shares = weights.float().mean((0, 2, 3)).tolist()
            self._sums = [a + b for a, b in zip(self._sums, shares, strict=True)]


def run_leading(ensemble: EnsembleDenoiser, count: int, every: int) -> None:
    """Run only the experts with the largest weights between every few steps.

    Args:
        ensemble: its schedule and its observer of weights are set.
        count: see `LeadingExperts`.
        every: see `LeadingExperts`.

    Raises:
        AfaError: if there are fewer experts, or a feature of the ensemble excludes a schedule.
    """
    if not 1 <= count <= len(ensemble.experts) or every < 2:
        raise AfaError(
            "AFA-ENSEMBLE-063",
            f"The number of experts that run must be from 1 to {len(ensemble.experts)}, and all "
            f"must run at every second step at most; got {count} experts and every {every} steps.",
        )
    leading = LeadingExperts(len(ensemble.experts), count, every)
    ensemble.schedule = leading
    ensemble.on_weights = leading.observe
