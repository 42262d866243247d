"""How an ensemble's weights are spread over its experts while it trains."""

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
    """Mean weights and entropy by site.

    Attributes:
        sites: the sites where experts are fused.
        shares: mean weight [sites, N] of each expert, over batch and pixels.
        entropy: mean entropy [sites] of the weights of a pixel, as a share of the largest, log N.
    """

    sites: tuple[str, ...]
    shares: Tensor
    entropy: Tensor

    @staticmethod
    def mean(seen: Sequence[Routing]) -> Routing:
        """The mean of several batches'."""
        return Routing(
            seen[0].sites,
            torch.stack([routing.shares for routing in seen]).mean(0),
            torch.stack([routing.entropy for routing in seen]).mean(0),
        )


@dataclass
class WeightTap:
    """The fusion weights [B, N, H, W] of the last call of an ensemble, with their gradients."""

    weights: dict[str, Tensor] = field(default_factory=dict)

    def routing(self) -> Routing:
        """Shares and entropies, without gradients."""
        with torch.no_grad():
            return Routing(tuple(self.weights), *_spread(self.weights.values()))

    def take(self) -> Routing | None:
        """As `routing`, and let the weights go; None where no site has any."""
        routing = self.routing() if self.weights else None
        self.weights.clear()
        return routing

    def penalty(self, entropy_weight: float, balance_weight: float) -> Tensor:
        """What the regularisers add to the loss.

        `entropy_weight` times one minus the entropy of a pixel's weights, and `balance_weight`
        times one minus the entropy of the mean weights, each as a share of log N and averaged over
        the sites. The first asks every pixel to listen to several experts; the second asks only
        that no expert is left out altogether, as the load-balancing losses of mixtures of experts
        (Shazeer et al., 2017, arXiv 1701.06538, section 4).
        """
        shares, entropy = _spread(self.weights.values())
        balance = _entropy(shares, 1) / _most(shares.shape[1])
        return entropy_weight * (1 - entropy.mean()) + balance_weight * (1 - balance.mean())


def _spread(weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean weights [sites, N] and mean entropies [sites] of weights [B, N, H, W]."""
    listed = [w.float() for w in weights]
    shares = torch.stack([w.mean((0, 2, 3)) for w in listed])
    entropies = torch.stack([_entropy(w, 1).mean() for w in listed])
    return shares, entropies / _most(shares.shape[1])


def _most(num_experts: int) -> float:
    """The largest entropy there can be; of one expert it is none, and any number serves."""
    return math.log(max(2, num_experts))


def _entropy(weights: Tensor, dim: int) -> Tensor:
    return -torch.xlogy(weights, weights.clamp(min=1e-12)).sum(dim)


@contextmanager
def tapped(ensemble: EnsembleDenoiser) -> Iterator[WeightTap]:
    """Keep the weights of every call of this thread."""
    tap = WeightTap()

    def observe(_: Tensor, site: str, weights: Tensor) -> None:
        tap.weights[site] = weights

    with observed(ensemble, observe):
        yield tap


class CollapseWatch:
    """Warns of experts that hardly get any weight at a site, for long.

    Args:
        experts: their names.
        patience: how many reports in a row are long.
    """

    def __init__(self, experts: Sequence[str], patience: int = 5) -> None:
        self._experts, self._patience = experts, patience
        self._in_a_row: dict[tuple[str, int], int] = {}
        self._said: dict[int, int] = {}

    def see(self, routing: Routing, step: int) -> list[str]:
        """A warning for each expert that has come to be starved at more sites than was said."""
        warnings = []
        for n, name in enumerate(self._experts):
            starved = []
            for site, share in zip(routing.sites, routing.shares[:, n].tolist(), strict=True):
                count = self._in_a_row.get((site, n), 0) + 1 if share < _RARE else 0
                self._in_a_row[site, n] = count
                if count >= self._patience:
                    starved.append(site)
            if len(starved) > self._said.get(n, 0):
                warnings.append(
                    f"The expert '{name}' has long had less than {_RARE:.0%} of the weight at "
                    f"{len(starved)} of {len(routing.sites)} sites (step {step}): "
                    f"{', '.join(starved)}. If it should matter more, set "
                    "training.balance_weight, or train on pictures that need it."
                )
            self._said[n] = max(self._said.get(n, 0), len(starved))
        return warnings
