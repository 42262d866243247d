"""The candidate settings of the rivals, on grids whose edges are reported if they win."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afa.aggregators.fusion import FUSIONS
from afa.aggregators.fusion.loratorio import LoRAtorioRecipe
from afa.aggregators.fusion.magic_fusion import MagicFusionRecipe
from afa.aggregators.fusion.nearest import NearestRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from afa.aggregators.fusion import FusionRecipe

#: of MagicFusion and of rules by distance, whose optima lay on the edges of their own grids
_TEMPERATURES = (0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
_LARGER_PATCHES = (8, 16)
#: the sites of shallow, middle and deep blocks, in each of which another expert leads in `MBW`
_DEPTHS = (
    ("conv_in", "down.0.0", "down.0.downsample"),
    ("down.1.0", "mid", "up.0.0"),
    ("up.0.1", "up.1.0", "conv_out"),
)
#: the row whose block weights are searched, and the trials of the search
SEARCHED, NUM_TRIALS = "autoMBW", 100
#: side of a latent, with which a patch is all of it
_SIDE = 16


@dataclass(frozen=True)
class Grid:
    """The candidates of one rival.

    Attributes:
        points: the values of the settings of each candidate.
        methods: the candidates, as methods of `afa evaluate`.
        ends: values that are no edges, because nothing lies beyond them, by setting.
    """

    points: Sequence[Mapping[str, Any]]
    methods: Sequence[dict[str, Any]]
    ends: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def edges(self, number: int) -> list[str]:
        """The settings of a candidate whose value is the first or last one of several."""
        found = []
        for name, value in self.points[number].items():
            values = {point[name] for point in self.points if name in point}
            is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            if not is_number or len(values) < 2 or value in self.ends.get(name, ()):
                continue
            if value in (min(values), max(values)):
                found.append(name)
        return found


def merges(num_experts: int) -> dict[str, Grid]:
    """The static merges of N experts, by row."""

    def leading(lead: float, leader: int) -> list[float]:
        rest = (1 - lead) / (num_experts - 1)
        return [lead if n == leader else rest for n in range(num_experts)]

    uniform = 1 / num_experts
    leads = [lead for lead in (0.5, 0.65, 0.8, 0.95) if lead > uniform + 0.01]
    places = [(uniform, 0), *itertools.product(leads, range(num_experts))]
    points = [{"lead": lead, "leader": f"expert {n}"} for lead, n in places]
    weighted = [leading(*place) for place in places]
    scales = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
    kept = [
        {"density": density, "weight": weight}
        for density in (0.1, 0.2, 0.35, 0.5, 0.8, 1.0)
        for weight in (0.05, 0.125, 0.25, 0.5, 1.0, 1.5)
    ]
    ends = {"lead": [uniform], "density": [1.0]}

    def of(method: str) -> Grid:
        methods = [
            _merge(method, density=each["density"], weights=[each["weight"]] * num_experts)
            for each in kept
        ]
        return Grid(kept, methods, ends)

    found = {
        "weighted merge": Grid(points, [_merge("weighted", weights=w) for w in weighted], ends),
        "SLERP merge": Grid(points, [_merge("slerp", weights=w) for w in weighted], ends),
        "add-difference merge": Grid(
            [{"weight": scale} for scale in scales],
            [_merge("add_difference", weights=[scale] * num_experts) for scale in scales],
        ),
        "TIES merge": of("ties"),
        "DARE merge": of("dare"),
    }
    if num_experts == len(_DEPTHS):
        found["MBW"] = _block_weights(leading)
    return found


def _block_weights(leading: Callable[[float, int], list[float]]) -> Grid:
    """Typical manual block weights, with a different expert in front at each depth.

    All orders of the experts over shallow, middle and deep blocks, and uniform weights for the
    text encoders.
    """
    experts = range(len(_DEPTHS))
    uniform = 1 / len(_DEPTHS)
    orders = list(itertools.permutations(experts))
    places = [(uniform, orders[0]), *itertools.product((0.4, 0.5, 0.65, 0.8, 1.0), orders)]
    points, methods = [], []
    for lead, order in places:
        weights = {"default": [uniform for _ in experts]}
        for sites, leader in zip(_DEPTHS, order, strict=True):
            weights |= {site: leading(lead, leader) for site in sites}
        points.append({"lead": lead, "leaders": ", ".join(f"expert {n}" for n in order)})
        methods.append(_merge("block_weights", block_weights=weights))
    return Grid(points, methods, {"lead": [uniform, 1.0]})


def _merge(method: str, **settings: Any) -> dict[str, Any]:
    return {"merge": {"method": method, **settings}}


def fusions(experts: Sequence[str]) -> dict[str, Grid]:
    """The fusions without training, by row; their grids are those of `FusionRecipe.rows`, wider."""
    found = {}
    for fusion in FUSIONS:
        rows: Mapping[str, Sequence[FusionRecipe]] = fusion.rows(experts)
        if fusion is MagicFusionRecipe:
            rows = {
                row: [MagicFusionRecipe(temperatures=[t]) for t in _TEMPERATURES] for row in rows
            }
        elif fusion is LoRAtorioRecipe or fusion is NearestRecipe:
            rows = {row: _with_larger_patches(own) for row, own in fusion.rows(experts).items()}
        for row, listed in rows.items():
            written = [each.model_dump(exclude_none=True) for each in listed]
            methods = [{"fusion": each} for each in written]
            points = [_numbers(each) for each in written]
            found[row] = Grid(points, methods, {"patch": [1, _SIDE]})
    return found


def _with_larger_patches(
    listed: Sequence[LoRAtorioRecipe | NearestRecipe],
) -> list[FusionRecipe]:
    """The candidates, and those of each temperature and null with the larger patches."""
    smallest = [each for each in listed if each.patch == 1]
    larger = itertools.product(smallest, _LARGER_PATCHES)
    return [*listed, *(each.model_copy(update={"patch": patch}) for each, patch in larger)]


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rule, those with one number as that number."""
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in settings.items()
        if name != "rule" and not (isinstance(value, list) and len(value) > 1)
    }
