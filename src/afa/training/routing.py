"""Statistics of the fusion weights during training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from afa.ensemble.recording import observed

if TYPE_CHECKING:
    from torch import Tensor

    from afa.ensemble.denoiser import EnsembleDenoiser

_RARE = 0.05


@dataclass(frozen=True)
class Routing:
    """Mean fusion weights and entropies by site.

    Attributes:
        sites: the sites where experts are fused.
        shares: mean weight [sites, N] of each expert over batch and pixels.
        entropy: mean entropy [sites] of the weights of a pixel, divided by its maximum log N.
    """

    sites: tuple[str, ...]
    shares: Tensor
    entropy: Tensor

    @staticmethod
    def mean(seen: Sequence[Routing]) -> Routing:
        """The mean over batches."""
        return Routing(
            seen[0].sites,
            torch.stack([routing.shares for routing in seen]).mean(0),
            torch.stack([routing.entropy for routing in seen]).mean(0),
        )


@dataclass
class WeightTap:
    """The fusion weights [B, N, H, W] of an ensemble's last call by site, with gradients."""

    weights: dict[str, Tensor] = field(default_factory=dict)

    def routing(self) -> Routing:
        """The statistics of the weights, without gradients."""
        with torch.no_grad():
            return Routing(tuple(self.weights), *_spread(self.weights.values()))

    def take(self) -> Routing | None:
        """The statistics, then drop the weights; None if no site has weights."""
        routing = self.routing() if self.weights else None
        self.weights.clear()
        return routing

    def penalty(self, entropy_weight: float, balance_weight: float) -> Tensor:
        """The regularisation terms of the loss.

        `entropy_weight` times one minus the entropy of a pixel's weights, plus `balance_weight`
        times one minus the entropy of the mean weights, each divided by log N and averaged over the
        sites. The first term makes each pixel use several experts. The second only makes each
        expert used somewhere, as the load-balancing losses of mixtures of experts (Shazeer et al.,
        2017, arXiv 1701.06538, section 4).
        """
        shares, entropy = _spread(self.weights.values())
        balance = _entropy(shares, 1) / _max_entropy(shares.shape[1])
        return entropy_weight * (1 - entropy.mean()) + balance_weight * (1 - balance.mean())


def _spread(weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean weights [sites, N] and mean entropies [sites] of weights [B, N, H, W]."""
    listed = [w.float() for w in weights]
    shares = torch.stack([w.mean((0, 2, 3)) for w in listed])
    entropies = torch.stack([_entropy(w, 1).mean() for w in listed])
    return shares, entropies / _max_entropy(shares.shape[1])


def _max_entropy(num_experts: int) -> float:
    """The maximum entropy; log 2 for one expert, whose entropy is always 0."""
    return math.log(max(2, num_experts))


def _entropy(weights: Tensor, dim: int) -> Tensor:
    return -torch.xlogy(weights, weights.clamp(min=1e-12)).sum(dim)


@contextmanager
def tapped(ensemble: EnsembleDenoiser) -> Iterator[WeightTap]:
    """Record the fusion weights of this thread's calls inside the block."""
    tap = WeightTap()

    def observe(_: Tensor, site: str, weights: Tensor) -> None:
        tap.weights[site] = weights

    with observed(ensemble, observe):
        yield tap


class CollapseWatch:
    """Warns of experts whose weight at a site stays low.

    Args:
        experts: names of the experts.
        patience: number of consecutive reports with low weight before a warning.
    """

    def __init__(self, experts: Sequence[str], patience: int = 5) -> None:
        self._experts, self._patience = experts, patience
        self._in_a_row: dict[tuple[str, int], int] = {}
        self._warned: dict[int, int] = {}  # expert -> number of sites in its last warning

    def see(self, routing: Routing, step: int) -> list[str]:
        """A warning for each expert with low weight at more sites than in its last warning."""
        warnings = []
        for n, name in enumerate(self._experts):
            starved = []
            for site, share in zip(routing.sites, routing.shares[:, n].tolist(), strict=True):
                count = self._in_a_row.get((site, n), 0) + 1 if share < _RARE else 0
                self._in_a_row[site, n] = count
                if count >= self._patience:
                    starved.append(site)
            if len(starved) > self._warned.get(n, 0):
                warnings.append(
                    f"The expert '{name}' has had less than {_RARE:.0%} of the weight at "
                    f"{len(starved)} of {len(routing.sites)} sites in the last {self._patience} "
                    f"reports (step {step}): {', '.join(starved)}. To use it more, set "
                    "training.balance_weight, or train on pictures that need it."
                )
                self._warned[n] = len(starved)
        return warnings
