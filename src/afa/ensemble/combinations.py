"""Features of an ensemble that exclude each other.

Whatever is not named here can be combined, and gives what the plain ensemble gives; tests/pairs
tries every feature with every other. What is named here is refused by whichever of the two is
switched on last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from afa.aggregators.rule import Schedule
from afa.ensemble.bias import Steering
from afa.ensemble.caching.settings import EXACT
from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import Tensor

    from afa.denoisers import Execution
    from afa.ensemble.caching.graphs import Graphs
    from afa.ensemble.caching.plan import PruningPlan
    from afa.ensemble.caching.settings import Acceleration
    from afa.ensemble.placement.devices import Devices
    from afa.ensemble.placement.exchange import Exchange
    from afa.ensemble.placement.ranks import Processes
    from afa.ensemble.protocol import Ensemble


Feature = Literal[
    "a pruning plan",
    "a schedule",
    "experts spread over processes",
    "sharded experts",
    "experts on several devices",
    "offloaded experts",
    "streamed experts",
    "CUDA graphs",
]

_SPREAD: Feature = "experts spread over processes"
_SHARDED: Feature = "sharded experts"
_DEVICES: Feature = "experts on several devices"
_OFFLOADED: Feature = "offloaded experts"
_STREAMED: Feature = "streamed experts"
_GRAPHS: Feature = "CUDA graphs"
_PLAN: Feature = "a pruning plan"
_SCHEDULE: Feature = "a schedule"


class Excluded(NamedTuple):
    """Two features, why they cannot be combined, and what to do; or one that is not repeated."""

    one: Feature
    other: Feature
    reason: str
    remedy: str


_FIXED = "a CUDA graph runs the same kernels on the same memory at every step"
_ALL_RUN = "every process must compute its own experts at every step"
_SAME_LAYERS = "every process must run the same layers at every step"
_ONE_PLACE = "every expert is kept in one place, which is chosen once"
_PLACEMENTS = (_SPREAD, _SHARDED, _DEVICES, _OFFLOADED, _STREAMED)

EXCLUDED: tuple[Excluded, ...] = (
    Excluded(
        _PLAN, _SCHEDULE, "both say which experts run at a step", "Set one of them to None first"
    ),
    Excluded(_PLAN, _SPREAD, _ALL_RUN, "Take off the plan, or load the experts in one process"),
    Excluded(
        _SCHEDULE, _SPREAD, _ALL_RUN, "Set schedule = None, or load the experts in one process"
    ),
    Excluded(_PLAN, _SHARDED, _SAME_LAYERS, "Take off the plan, or load the experts whole"),
    Excluded(_SCHEDULE, _SHARDED, _SAME_LAYERS, "Set schedule = None, or load the experts whole"),
    *(
        Excluded(_GRAPHS, other, _FIXED, "Leave CUDA graphs out, or the other")
        for other in (_PLAN, _SCHEDULE, *_PLACEMENTS)
    ),
    # experts that are offloaded or streamed can be moved again, so these two are no pair
    *(
        Excluded(one, other, _ONE_PLACE, "Load the ensemble anew to move its experts elsewhere")
        for n, one in enumerate((_SPREAD, _SHARDED, _DEVICES))
        for other in _PLACEMENTS[n:]
    ),
)


_SWITCHES = ("schedule", "plan", "graphs", "bias", "steering", "acceleration")


class Switches:
    """The part of `EnsembleDenoiser` that is switched on and off."""

    aggregators: Any
    execution: Execution
    exchange: Exchange | None
    devices: Devices | None
    shards: Processes | None
    begin_anew: Callable[[], None]
    _schedule: Schedule | None = None
    _plan: PruningPlan | None = None
    _graphs: Graphs | None = None
    _bias: Mapping[str, Tensor] = {}
    #: the hook that adds the bias
    steering: Steering | None = None
    _acceleration: Acceleration = EXACT

    def __setattr__(self, name: str, value: Any) -> None:
        # a module, such as a learned schedule, would be registered past the property
        if name.removeprefix("_") in _SWITCHES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def features_in_use(self) -> set[Feature]:
        """Which of the features that exclude others are switched on."""
        is_on: dict[Feature, bool] = {
            _PLAN: self._plan is not None,
            _SCHEDULE: self._schedule is not None,
            _SPREAD: self.exchange is not None,
            _SHARDED: self.shards is not None,
            _DEVICES: self.devices is not None,
            _OFFLOADED: self.execution.device is not None and self.execution.source is None,
            _STREAMED: self.execution.source is not None,
            _GRAPHS: self._graphs is not None,
        }
        return {feature for feature, on in is_on.items() if on}

    def require_compatible(self, wanted: Feature) -> None:
        """Refuse to switch on a feature beside one that excludes it.

        Raises:
            AfaError: names both, why, and what to do.
        """
        for other in sorted(self.features_in_use()):
            for excluded in EXCLUDED:
                if {excluded.one, excluded.other} == {wanted, other}:
                    first = wanted[0].upper() + wanted[1:]
                    raise AfaError(
                        "AFA-ENSEMBLE-018",
                        f"{first} cannot be combined with {other}: {excluded.reason}. "
                        f"{excluded.remedy}.",
                    )

    @property
    def schedule(self) -> Schedule | None:
        """Which experts run at a timestep; None runs all.

        Setting it raises AfaError where the fusion rules need all experts, or beside a plan, CUDA
        graphs or experts that are spread over processes.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        if schedule is not None:
            self.require_compatible("a schedule")
            rigid = {type(rule).__name__ for rule in self.aggregators if not _takes_some(rule)}
            if rigid:
                raise AfaError(
                    "AFA-ENSEMBLE-019",
                    f"A schedule cannot be combined with {', '.join(sorted(rigid))}, which needs "
                    "the features of all experts at every step. Leave the schedule out, or use "
                    "Mean, Only or SABW.",
                )
        self._schedule = schedule

    @property
    def plan(self) -> PruningPlan | None:
        """Which experts run where; see `afa.accelerate`.

        Setting it raises AfaError for a plan of another ensemble, and beside a schedule, CUDA
        graphs or experts that are spread over processes.
        """
        return self._plan

    @plan.setter
    def plan(self, plan: PruningPlan | None) -> None:
        if plan is not None:
            self.require_compatible("a pruning plan")
            plan.check(cast("Ensemble", self))
        self._plan = plan

    @property
    def graphs(self) -> Graphs | None:
        """What records steps as CUDA graphs; see `afa.accelerate`.

        Setting it raises AfaError beside a plan, a schedule or experts that are not in the memory
        of one device.
        """
        return self._graphs

    @graphs.setter
    def graphs(self, graphs: Graphs | None) -> None:
        if graphs is not None:
            self.require_compatible("CUDA graphs")
        self._graphs = graphs

    @property
    def acceleration(self) -> Acceleration:
        """What is left out of denoising loops; see `afa.accelerate`.

        Setting it begins a loop anew: what was kept under other settings is of other sites.
        """
        return self._acceleration

    @acceleration.setter
    def acceleration(self, acceleration: Acceleration) -> None:
        self._acceleration = acceleration
        self.begin_anew()

    @property
    def bias(self) -> Mapping[str, Tensor]:
        """What is added to the experts' logits [N], by site; see `afa.steer`."""
        return self._bias

    @bias.setter
    def bias(self, bias: Mapping[str, Tensor]) -> None:
        self._bias, self.steering = bias, Steering(bias) if bias else None
        self.begin_anew()


def _takes_some(rule: Any) -> bool:
    return getattr(rule, "takes_some", False)
