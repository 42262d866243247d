"""Pruning: which experts run at which site and step, by how much anyone listens to them there."""

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
    """Part of a denoising loop: timesteps above `above`; None, whatever is left.

    `experts` are those that run at a site, by number; sites where all do are left out.
    """

    above: float | None
    experts: dict[str, list[int]]


class PruningPlan(Section):
    """Which experts run where and when.

    Attributes:
        num_experts: of the ensemble.
        sites: of the ensemble, those where experts are fused.
        keep: the least share of the fusion weights that the experts left have, at every site and
            range of steps, over the prompts that the plan was made on.
        ranges: from pure noise on; a timestep is in the first that takes it.
        aggregators: SHA-256 of the weights of the aggregators whose decisions it follows; None in
            plans of earlier releases, which did not tell.
    """

    format: Literal["afa-pruning-plan"] = "afa-pruning-plan"
    version: Literal[1] = 1
    num_experts: int = Field(ge=1)
    sites: list[str]
    keep: float = Field(gt=0, le=1)
    ranges: list[StepRange]
    aggregators: str | None = None

    def at(self, timestep: float) -> Mapping[str, Sequence[int]]:
        """The experts that run at a timestep, by site; at other sites all do."""
        for part in self.ranges:
            if part.above is None or timestep > part.above:
                return part.experts
        return {}

    @property
    def share_left(self) -> float:
        """The share of all runs of an expert to a site that is left."""
        whole = len(self.ranges) * len(self.sites) * self.num_experts
        left_out = sum(
            self.num_experts - len(experts)
            for part in self.ranges
            for experts in part.experts.values()
        )
        return 1 - left_out / whole

    def check(self, ensemble: Ensemble) -> None:
        """See that the plan is of such an ensemble.

        Raises:
            AfaError: it has other experts, sites or aggregators, fusion rules that need all
                experts, or it leaves different experts to the two streams of a block.
        """
        listed = fused_sites(ensemble)
        if (self.num_experts, self.sites) != (len(ensemble.experts), listed):
            raise AfaError(
                "AFA-ENSEMBLE-005",
                f"A pruning plan must be of this ensemble, with {len(ensemble.experts)} experts "
                f"and {len(listed)} sites where they are fused; it is of one with "
                f"{self.num_experts} and {len(self.sites)}. Make one: afa prune ENSEMBLE.",
            )
        made_with = self.aggregators
        if made_with is not None and made_with != hash_weights(ensemble.aggregators):
            raise AfaError(
                "AFA-ENSEMBLE-006",
                "This pruning plan was made with other aggregators, which decide otherwise who is "
                "needed where. Make one of this ensemble: afa prune ENSEMBLE.",
            )
        unknown = {
            n for part in self.ranges for experts in part.experts.values() for n in experts
        } - set(range(self.num_experts))
        nobody = any(not experts for part in self.ranges for experts in part.experts.values())
        elsewhere = {site for part in self.ranges for site in part.experts} - set(listed)
        if unknown or nobody or elsewhere:
            raise AfaError(
                "AFA-ENSEMBLE-007",
                "A pruning plan must leave at least one expert at every site, by its number below "
                f"{self.num_experts}, and name no other sites. Make it anew: afa prune ENSEMBLE.",
            )
        for part in self.ranges:
            for site in ensemble.sites:
                own, of_block = part.experts.get(site.name), part.experts.get(site.block)
                if site.name in listed and site.block in listed and own != of_block:
                    raise AfaError(
                        "AFA-ENSEMBLE-008",
                        f"A pruning plan must leave the same experts at '{site.name}' and "
                        f"'{site.block}', which one block computes together; it leaves {own} and "
                        f"{of_block}. Make it anew: afa prune ENSEMBLE.",
                    )


def fused_sites(ensemble: Ensemble) -> list[str]:
    """The names of the sites where experts are fused, so that some may be left out."""
    pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
    return [site.name for site, rule in pairs if getattr(rule, "can_prune", False)]


class Shares:
    """Mean fusion weights by range of timesteps, site and expert, of pictures that are drawn.

    Args:
        ensemble: whose weights are seen.
        num_ranges: of timesteps, of one length.
        highest: the timestep of pure noise.
    """

    def __init__(self, ensemble: Ensemble, num_ranges: int, highest: float) -> None:
        self._ensemble, self._num_ranges, self._highest = ensemble, num_ranges, highest
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def note(self, steps: Tensor, site: str, weights: Tensor) -> None:
        """An observer for `EnsembleDenoiser.on_weights`."""
        key = (self._range_of(float(steps.flatten()[0])), site)
        shares = weights.detach().float().mean((0, 2, 3)).cpu()
        self._sums[key] = self._sums.get(key, torch.zeros_like(shares)) + shares
        self._counts[key] = self._counts.get(key, 0) + 1

    def _range_of(self, timestep: float) -> int:
        lower = [self._highest * (1 - (k + 1) / self._num_ranges) for k in range(self._num_ranges)]
        return next((k for k, above in enumerate(lower) if timestep > above), self._num_ranges - 1)

    def mean(self, part: int, site: str) -> Tensor:
        """Mean weights [N] in one range at one site."""
        return self._sums[part, site] / self._counts[part, site]

    def plan(self, keep: float) -> PruningPlan:
        """The fewest experts at every site and range that have at least this share of the weights.

        Sites of a text go with the picture's of the same block, whose layers give both.

        Raises:
            AfaError: no picture was drawn, or `keep` is not above 0 and at most 1.
        """
        if not 0 < keep <= 1:
            raise AfaError("AFA-ENSEMBLE-009", f"keep must be above 0 and at most 1, came {keep}.")
        if not self._sums:
            raise AfaError(
                "AFA-ENSEMBLE-010",
                "A pruning plan is made from pictures; none was drawn. Give prompts.",
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
    """The fewest experts whose shares [N] add up to `keep` of the whole."""
    order = shares.argsort(descending=True)
    reached = shares[order].cumsum(0) / shares.sum()
    # a hair less: shares of float32 add up to a hair less than one
    return order[: int((reached < keep - 1e-6).sum()) + 1].tolist()


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write a plan as JSON."""
    write_atomic(path, json.dumps(plan.model_dump(), indent=1) + "\n")


def load_plan(path: Path) -> PruningPlan:
    """Read a plan that `save_plan` has written.

    Raises:
        AfaError: it cannot be read, or is something else.
    """
    try:
        return PruningPlan.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-ENSEMBLE-011",
            f"'{path}' must be a plan of `afa prune`, but at '{place}': {first['msg']}.",
        ) from None
