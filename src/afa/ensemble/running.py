"""Which experts run in a step, and at which sites: what a schedule or a pruning plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from afa.aggregators.rule import Schedule


class Running(NamedTuple):
    """The experts that run in a step, by number; `by_site` where a plan leaves some out."""

    experts: Sequence[int]
    by_site: Mapping[str, Sequence[int]] = {}

    def at(self, site: str) -> Sequence[int]:
        """The experts that are fused at a site."""
        return self.by_site.get(site, self.experts)

    def left_out(self, expert: int) -> frozenset[str]:
        """The sites where an expert that runs is left out."""
        return frozenset(site for site, experts in self.by_site.items() if expert not in experts)


def running_at(
    steps: Tensor,
    num_experts: int,
    schedule: Schedule | None,
    plan: Callable[[float], Mapping[str, Sequence[int]]] | None,
) -> Running:
    """The experts that run at some timesteps; of a schedule and a plan there is one at most.

    Args:
        steps: timesteps [B].
        num_experts: of the ensemble.
        schedule: the experts that run at a timestep.
        plan: the experts that run at a timestep by site; see `PruningPlan.at`.

    Raises:
        AfaError: several timesteps where a schedule picks the experts; or it picks none, one twice,
            or one that there is not.
    """
    every = range(num_experts)
    if schedule is None and plan is None:
        return Running(every)
    distinct = steps.unique().tolist()
    if plan is not None:
        return Running(every, plan(distinct[0]) if len(distinct) == 1 else {})
    assert schedule is not None, "there is one of both"
    if len(distinct) > 1:
        raise AfaError(
            "AFA-ENSEMBLE-049",
            "Where a schedule picks the experts, all of a batch must have one timestep, came "
            f"{', '.join(f'{step:g}' for step in distinct)}. Call it once for each.",
        )
    picked = list(schedule(distinct[0]))
    if not picked or len(set(picked)) < len(picked) or not set(picked) <= set(every):
        raise AfaError(
            "AFA-ENSEMBLE-050",
            f"The schedule picked the experts {picked} at timestep {distinct[0]:g}; it must "
            f"pick at least one, each once, by numbers from 0 to {num_experts - 1}. Correct "
            "the schedule.",
        )
    return Running(sorted(picked))
