"""Pruning plans: skip experts at sites and steps where their average fusion weight is low."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, ValidationError

from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.recipe import Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from afa.ensemble.protocol import Ensemble


class StepRange(Section):
    """A part of the denoising loop: the timesteps above `above`; None means all remaining ones.

    `experts` has the numbers of the experts that run, by site; at other sites all experts run.
    """

    above: float | None
    experts: dict[str, list[int]]


class PruningPlan(Section):
    """Which experts run at which sites and steps.

    Attributes:
        num_experts: the number of experts in the ensemble.
        sites: the ensemble's sites at which experts are fused.
        keep: the minimum share of the fusion weights that the remaining experts have at every site
            and range, averaged over the calibration prompts.
        ranges: timestep ranges from pure noise on; the first range that fits a timestep applies.
        aggregators: SHA-256 of the aggregators' weights; None in plans of earlier releases.
    """

    format: Literal["afa-pruning-plan"] = "afa-pruning-plan"
    version: Literal[1] = 1
    num_experts: int = Field(ge=1)
    sites: list[str]
    keep: float = Field(gt=0, le=1)
    ranges: list[StepRange]
    aggregators: str | None = None

    def at(self, timestep: float) -> Mapping[str, Sequence[int]]:
        """The numbers of the experts that run at a timestep, by site; elsewhere all experts run."""
        for part in self.ranges:
            if part.above is None or timestep > part.above:
                return part.experts
        return {}

    @property
    def share_left(self) -> float:
        """The fraction of all (range, site, expert) triples that still run."""
        whole = len(self.ranges) * len(self.sites) * self.num_experts
        left_out = sum(
            self.num_experts - len(experts)
            for part in self.ranges
            for experts in part.experts.values()
        )
        return 1 - left_out / whole

    def check(self, ensemble: Ensemble) -> None:
        """Check that the plan fits an ensemble.

        Raises:
            AfaError: if the number of experts, the sites or the aggregators differ, the plan names
                unknown experts or sites, leaves no expert at a site, or leaves different experts at
                the two streams of a block.
        """
        listed = fused_sites(ensemble)
        if (self.num_experts, self.sites) != (len(ensemble.experts), listed):
            raise AfaError(
                "AFA-ENSEMBLE-005",
                f"The pruning plan is for {self.num_experts} experts and {len(self.sites)} fused "
                f"sites, but this ensemble has {len(ensemble.experts)} experts and {len(listed)} "
                "fused sites. Make a plan for it: afa prune ENSEMBLE.",
            )
        made_with = self.aggregators
        if made_with is not None and made_with != hash_weights(ensemble.aggregators):
            raise AfaError(
                "AFA-ENSEMBLE-006",
                "The pruning plan was made with other aggregators, whose fusion weights differ. "
                "Make a plan for this ensemble: afa prune ENSEMBLE.",
            )
        unknown = {
            n for part in self.ranges for experts in part.experts.values() for n in experts
        } - set(range(self.num_experts))
        is_empty = any(not experts for part in self.ranges for experts in part.experts.values())
        elsewhere = {site for part in self.ranges for site in part.experts} - set(listed)
        if unknown or is_empty or elsewhere:
            raise AfaError(
                "AFA-ENSEMBLE-007",
                "The pruning plan leaves a site without experts, or names an unknown site or an "
                f"expert that is not from 0 to {self.num_experts - 1}. Make it again: afa prune "
                "ENSEMBLE.",
            )
        for part in self.ranges:
            for site in ensemble.sites:
                own, of_block = part.experts.get(site.name), part.experts.get(site.block)
                if site.name in listed and site.block in listed and own != of_block:
                    raise AfaError(
                        "AFA-ENSEMBLE-008",
                        f"The pruning plan has the experts {own} at '{site.name}' but {of_block} "
                        f"at '{site.block}'; one block computes both, so they must be equal. Make "
                        "it again: afa prune ENSEMBLE.",
                    )


def fused_sites(ensemble: Ensemble) -> list[str]:
    """The names of the sites at which experts are fused and can be pruned."""
    pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
    return [site.name for site, rule in pairs if getattr(rule, "can_prune", False)]


class Shares:
    """Average fusion weights by timestep range, site and expert, measured on pictures.

    Args:
        ensemble: the ensemble that draws the pictures.
        num_ranges: the number of timestep ranges, all of equal length.
        highest: the timestep of pure noise.
    """

    def __init__(self, ensemble: Ensemble, num_ranges: int, highest: float) -> None:
        self._ensemble, self._num_ranges, self._highest = ensemble, num_ranges, highest
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def note(self, steps: Tensor, site: str, weights: Tensor) -> None:
        """Add the weights of one site; an observer for `observed` or `on_weights`."""
        key = (self._range_of(float(steps.flatten()[0])), site)
        shares = weights.detach().float().mean((0, 2, 3)).cpu()
        self._sums[key] = self._sums.get(key, torch.zeros_like(shares)) + shares
        self._counts[key] = self._counts.get(key, 0) + 1

    def _range_of(self, timestep: float) -> int:
        lower = [self._highest * (1 - (k + 1) / self._num_ranges) for k in range(self._num_ranges)]
        return next((k for k, above in enumerate(lower) if timestep > above), self._num_ranges - 1)

    def mean(self, part: int, site: str) -> Tensor:
        """Average fusion weights [N] of one site in one timestep range."""
        return self._sums[part, site] / self._counts[part, site]

    def plan(self, keep: float) -> PruningPlan:
        """Make a plan of the fewest experts per site and range with at least this weight share.

        The image and text sites of one block get the same experts, because its layers compute both.

        Args:
            keep: the minimum share of the fusion weights, above 0 and at most 1.

        Raises:
            AfaError: if no picture was drawn, or `keep` is out of range.
        """
        if not 0 < keep <= 1:
            raise AfaError("AFA-ENSEMBLE-009", f"keep must be above 0 and at most 1; got {keep}.")
        if not self._sums:
            raise AfaError(
                "AFA-ENSEMBLE-010",
                "A pruning plan is made from pictures, but none was drawn. Pass prompts.",
            )
        listed = fused_sites(self._ensemble)
        blocks = {site.name: site.block for site in self._ensemble.sites}
        count = len(self._ensemble.experts)
        ranges = []
        for part in range(self._num_ranges):
            needed: dict[str, set[int]] = {}
            for site in listed:
                if (part, site) in self._sums:
                    chosen = _fewest(self.mean(part, site), keep)
                    needed.setdefault(blocks[site], set()).update(chosen)
            experts = {
                site: sorted(needed[blocks[site]])
                for site in listed
                if len(needed.get(blocks[site], range(count))) < count
            }
            above = self._highest * (1 - (part + 1) / self._num_ranges)
            is_last = part == self._num_ranges - 1
            ranges.append(StepRange(above=None if is_last else above, experts=experts))
        return PruningPlan(
            num_experts=count,
            sites=listed,
            keep=keep,
            ranges=ranges,
            aggregators=hash_weights(self._ensemble.aggregators),
        )


def _fewest(shares: Tensor, keep: float) -> list[int]:
    """The fewest experts whose shares [N] add up to `keep` of their sum."""
    order = shares.argsort(descending=True)
    reached = shares[order].cumsum(0) / shares.sum()
    # the tolerance is for rounding: shares in float32 may add up to less than one
    return order[: int((reached < keep - 1e-6).sum()) + 1].tolist()


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write a plan to a JSON file."""
    write_atomic(path, json.dumps(plan.model_dump(), indent=1) + "\n")


def load_plan(path: Path) -> PruningPlan:
    """Read a plan that `save_plan` wrote.

    Raises:
        AfaError: if the file cannot be read or is not a plan.
    """
    try:
        return PruningPlan.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-ENSEMBLE-011",
            f"'{path}' is not a plan of `afa prune`: at '{place}', {first['msg']}. Make one: afa "
            "prune ENSEMBLE.",
        ) from None
