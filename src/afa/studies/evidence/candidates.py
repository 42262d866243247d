"""The candidate settings of the rivals, on grids whose edges are reported if they win."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.aggregators.fusion import FUSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Grid:
    """The candidates of one rival.

    Attributes:
        axes: the values of each setting, in order.
        methods: the candidates, one for each combination in the order of `itertools.product`.
    """

    axes: Mapping[str, Sequence[Any]]
    methods: Sequence[dict[str, Any]]

    def at(self, number: int) -> dict[str, Any]:
        """The values of the settings of a candidate."""
        combination = list(itertools.product(*self.axes.values()))[number]
        return dict(zip(self.axes, combination, strict=True))

    def edges(self, number: int) -> list[str]:
        """The settings of a candidate that are the first or last of a numeric axis."""
        values = self.at(number)
        return [
            name
            for name, axis in self.axes.items()
            if len(axis) > 2
            and all(isinstance(value, int | float) for value in axis)
            and values[name] in (axis[0], axis[-1])
        ]


def merges(num_experts: int) -> dict[str, Grid]:
    """The static merges of N experts, by row."""

    def leading(lead: float, leader: int) -> list[float]:
        rest = (1 - lead) / (num_experts - 1)
        return [lead if n == leader else rest for n in range(num_experts)]

    leads = tuple(dict.fromkeys((1 / num_experts, 0.5, 0.65, 0.8)))
    leaders = range(num_experts)
    weighted = [leading(lead, leader) for lead, leader in itertools.product(leads, leaders)]
    leaning = {"lead": leads, "leader": [f"expert {n}" for n in leaders]}
    scales = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
    densities = (0.1, 0.2, 0.35, 0.5, 0.8, 1.0)
    factors = (0.05, 0.125, 0.25, 0.5, 1.0, 1.5)
    kept = {"density": densities, "weight": factors}
    return {
        "weighted merge": Grid(leaning, [_merge("weighted", weights=w) for w in weighted]),
        "SLERP merge": Grid(leaning, [_merge("slerp", weights=w) for w in weighted]),
        "add-difference merge": Grid(
            {"weight": scales},
            [_merge("add_difference", weights=[w] * num_experts) for w in scales],
        ),
        **{
            row: Grid(
                kept,
                [
                    _merge(method, density=d, weights=[w] * num_experts)
                    for d, w in itertools.product(densities, factors)
                ],
            )
            for row, method in (("TIES merge", "ties"), ("DARE merge", "dare"))
        },
    }


def _merge(method: str, **settings: Any) -> dict[str, Any]:
    return {"merge": {"method": method, **settings}}


def fusions(experts: Sequence[str]) -> dict[str, Grid]:
    """The fusions without training, by row; their grids are those of `FusionRecipe.rows`."""
    found = {}
    for fusion in FUSIONS:
        for row, listed in fusion.rows(experts).items():
            methods = [{"fusion": each.model_dump(exclude_none=True)} for each in listed]
            found[row] = Grid({"candidate": [str(n) for n in range(len(methods))]}, methods)
    return found
