"""Features of an ensemble that exclude each other.

Features that are not listed here can be combined, and the result equals that of the plain ensemble:
tests/pairs tries every pair. A pair that is listed here is refused by the feature that is switched
on last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from afa.aggregators import Separate
from afa.aggregators.rule import Schedule
from afa.denoisers.packed import packed_layers
from afa.denoisers.predictor import Predictor
from afa.ensemble.bias import Steering
from afa.ensemble.caching.settings import EXACT, PRESETS
from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import Tensor

    from afa.denoisers import Execution, Site
    from afa.denoisers.packed import PackedLinear
    from afa.ensemble.caching.graphs import Graphs
    from afa.ensemble.caching.plan import PruningPlan
    from afa.ensemble.caching.settings import Acceleration
    from afa.ensemble.placement.devices import Devices
    from afa.ensemble.placement.exchange import Exchange
    from afa.ensemble.placement.ranks import Processes
    from afa.ensemble.protocol import Ensemble
    from afa.ensemble.regions import Regions


Feature = Literal[
    "a pruning plan",
    "a schedule",
    "experts spread over processes",
    "sharded experts",
    "experts on several devices",
    "offloaded experts",
    "streamed experts",
    "CUDA graphs",
    "a bias by region",
    "drafts",
]

_SPREAD: Feature = "experts spread over processes"
_SHARDED: Feature = "sharded experts"
_DEVICES: Feature = "experts on several devices"
_OFFLOADED: Feature = "offloaded experts"
_STREAMED: Feature = "streamed experts"
_GRAPHS: Feature = "CUDA graphs"
_PLAN: Feature = "a pruning plan"
_SCHEDULE: Feature = "a schedule"
_REGIONS: Feature = "a bias by region"
_DRAFTS: Feature = "drafts"


class Excluded(NamedTuple):
    """Two features that exclude each other, why, and what to do.

    A feature beside itself cannot be switched on a second time.
    """

    one: Feature
    other: Feature
    reason: str
    remedy: str


_FIXED = "a CUDA graph runs the same kernels on the same memory at every step"
_ALL_RUN = "every process must compute its own experts at every step"
_SAME_LAYERS = "every process must run the same layers at every step"
_ALONE = "each expert drafts alone, at all sites and steps"
_OWN_REGIONS = "each process would have its own regions"
_ONE_PLACE = "the placement of the experts can be set only once"
_PLACEMENTS = (_SPREAD, _SHARDED, _DEVICES, _OFFLOADED, _STREAMED)

EXCLUDED: tuple[Excluded, ...] = (
    Excluded(
        _PLAN, _SCHEDULE, "both select the experts of a step", "Set one of them to None first"
    ),
    Excluded(_PLAN, _SPREAD, _ALL_RUN, "Set plan = None, or load the experts in one process"),
    Excluded(
        _SCHEDULE, _SPREAD, _ALL_RUN, "Set schedule = None, or load the experts in one process"
    ),
    Excluded(_PLAN, _SHARDED, _SAME_LAYERS, "Set plan = None, or do not shard the experts"),
    Excluded(_SCHEDULE, _SHARDED, _SAME_LAYERS, "Set schedule = None, or do not shard the experts"),
    *(
        Excluded(_GRAPHS, other, _FIXED, "Switch one of the two off")
        for other in (_PLAN, _SCHEDULE, *_PLACEMENTS)
    ),
    *(Excluded(one, _GRAPHS, _FIXED, "Switch one of the two off") for one in (_REGIONS, _DRAFTS)),
    *(
        Excluded(_DRAFTS, other, _ALONE, "Switch one of the two off")
        for other in (_PLAN, _SCHEDULE)
    ),
    *(
        Excluded(one, other, _OWN_REGIONS, "Load the experts in one process")
        for one in (_REGIONS, _DRAFTS)
        for other in (_SPREAD, _SHARDED)
    ),
    # offloaded or streamed experts can be moved again, so these two do not exclude each other
    *(
        Excluded(one, other, _ONE_PLACE, "Load the ensemble again to change it")
        for n, one in enumerate((_SPREAD, _SHARDED, _DEVICES))
        for other in _PLACEMENTS[n:]
    ),
)


_SWITCHES = ("schedule", "plan", "graphs", "bias", "steering", "regions", "drafter", "acceleration")


class Switches:
    """The settings of `EnsembleDenoiser` that switch features on and off."""

    experts: Any
    aggregators: Any
    sites: Sequence[Site]
    execution: Execution
    exchange: Exchange | None
    devices: Devices | None
    shards: Processes | None
    reset_loops: Callable[[], None]
    _schedule: Schedule | None = None
    _plan: PruningPlan | None = None
    _graphs: Graphs | None = None
    _bias: Mapping[str, Tensor] = {}
    #: the hook that adds the bias to the logits
    steering: Steering | None = None
    _regions: Regions | None = None
    _drafter: Any = None
    #: whether an expert draws a draft, which observers do not see
    is_drafting = False
    _acceleration: Acceleration = EXACT

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a module, such as a learned schedule, and bypass the property
        if name.removeprefix("_") in _SWITCHES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _packed(self) -> list[PackedLinear]:
        """The quantised layers of all experts."""
        return [layer for expert in self.experts for layer in packed_layers(expert).values()]

    def features_in_use(self) -> set[Feature]:
        """The features that are switched on, of those that exclude others."""
        is_on: dict[Feature, bool] = {
            _PLAN: self._plan is not None,
            _SCHEDULE: self._schedule is not None,
            _SPREAD: self.exchange is not None,
            _SHARDED: self.shards is not None,
            _DEVICES: self.devices is not None,
            _OFFLOADED: self.execution.device is not None and self.execution.source is None,
            _STREAMED: self.execution.source is not None,
            _GRAPHS: self._graphs is not None,
            _REGIONS: self._regions is not None,
            _DRAFTS: self._drafter is not None,
        }
        return {feature for feature, on in is_on.items() if on}

    def require_compatible(self, wanted: Feature) -> None:
        """Check that a feature can be combined with those that are switched on.

        Raises:
            AfaError: if one of them excludes it.
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
        """A function from a timestep to the numbers of the experts that run; None runs all experts.

        Setting it raises AfaError if a fusion rule needs the features of all experts, or if a
        feature that excludes it is switched on, such as a plan or CUDA graphs.
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
                    "the features of all experts at every step. Set schedule = None, or use Mean, "
                    "Only or SABW.",
                )
        self._schedule = schedule

    @property
    def plan(self) -> PruningPlan | None:
        """The pruning plan: which experts run at which sites and steps; see `afa.accelerate`.

        Setting it raises AfaError if the plan was made for another ensemble, or if a feature that
        excludes it is switched on, such as a schedule or CUDA graphs.
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
        """Records steps as CUDA graphs and replays them; see `afa.accelerate`.

        Setting it raises AfaError if a plan or a schedule is set, if the experts are not in the
        memory of one device, if they have weights of GGUF files, or if predictions alone are fused.
        """
        return self._graphs

    @graphs.setter
    def graphs(self, graphs: Graphs | None) -> None:
        if graphs is not None:
            self.require_compatible("CUDA graphs")
            if isinstance(self.experts[0], Predictor):
                raise AfaError(
                    "AFA-ENSEMBLE-072",
                    "CUDA graphs cannot be combined with experts whose predictions alone are fused "
                    "(fuse: predictions): they are called as their own pipelines do it, which "
                    "copies sizes from the CPU. Switch CUDA graphs off.",
                )
            blocks = next((m for m in self._packed() if m.has_blocks), None)
            if blocks is not None:
                raise AfaError(
                    "AFA-ENSEMBLE-070",
                    "CUDA graphs cannot be combined with experts from GGUF files (this one has "
                    f"{blocks.quantisation} weights): their dequantisation copies tables from the "
                    "CPU. Switch CUDA graphs off, or use float8 or bfloat16 experts.",
                )
        self._graphs = graphs

    @property
    def acceleration(self) -> Acceleration:
        """How much of a denoising loop is reused from earlier steps; see `afa.accelerate`.

        Setting it clears the cache, whose features belong to the sites of the earlier settings. It
        raises AfaError if there are no features to reuse.
        """
        return self._acceleration

    @acceleration.setter
    def acceleration(self, acceleration: Acceleration) -> None:
        if len(self.sites) == 1 and acceleration in PRESETS.values():
            acceleration = replace(acceleration, fresh=0)  # only predictions can be reused
        if len(self.sites) == 1 and acceleration.fresh and not acceleration.is_exact:
            raise AfaError(
                "AFA-ENSEMBLE-068",
                "The experts' predictions alone are fused, so there are no features of inner "
                "blocks to reuse. Set fresh to 0, which reuses predictions.",
            )
        self._acceleration = acceleration
        self.reset_loops()

    @property
    def bias(self) -> Mapping[str, Tensor]:
        """By site, a bias [N] that is added to the experts' logits; see `afa.steer`."""
        return self._bias

    @bias.setter
    def bias(self, bias: Mapping[str, Tensor]) -> None:
        self._bias, self.steering = bias, Steering(bias) if bias else None
        self.reset_loops()

    @property
    def regions(self) -> Regions | None:
        """The hook that adds a bias by region of the next pictures; see `afa.drafting`.

        Setting it raises AfaError if the weights of an aggregator are not a softmax of logits, or
        if a feature that excludes it is switched on, such as CUDA graphs.
        """
        return self._regions

    @regions.setter
    def regions(self, regions: Regions | None) -> None:
        if regions is not None:
            self.require_compatible("a bias by region")
            require_logits(self.aggregators)
        self._regions = regions
        self.reset_loops()

    @property
    def drafter(self) -> Any:
        """What makes the bias by region of the next pictures; see `afa.drafting`.

        Setting it raises AfaError, see `require_drafts`.
        """
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Any) -> None:
        if drafter is not None:
            self.require_drafts()
        self._drafter = drafter
        self.reset_loops()

    def require_drafts(self) -> None:
        """Check that experts can draft alone, and that a bias by region can then be added.

        Raises:
            AfaError: if not.
        """
        self.require_compatible("drafts")
        require_logits(self.aggregators)

    @contextmanager
    def drafting(self, expert: int) -> Iterator[None]:
        """Run one expert alone inside the block; observers do not see it."""
        self._schedule, self.is_drafting = lambda _: [expert], True
        try:
            yield
        finally:
            self._schedule, self.is_drafting = None, False


def require_logits(rules: Iterable[Any]) -> None:
    """Check that fusion weights are softmaxes of logits, to which a bias can be added.

    Raises:
        AfaError: if those of a rule are not.
    """
    rigid = {type(rule).__name__ for rule in rules if not _has_logits(rule)}
    if rigid:
        raise AfaError(
            "AFA-ENSEMBLE-054",
            f"Aggregators of the type {', '.join(sorted(rigid))} have no logits, so a bias cannot "
            "be added. Train SABW aggregators with afa train.",
        )


def _has_logits(rule: Any) -> bool:
    """Whether a rule's weights are a softmax of logits, or the rule fuses nothing."""
    return isinstance(rule, Separate) or getattr(rule, "can_steer", False)


def _takes_some(rule: Any) -> bool:
    return getattr(rule, "takes_some", False)
