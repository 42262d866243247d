"""Select the experts that run in a step, and their sites, by a schedule or a pruning plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from afa.aggregators.rule import Schedule


class Running(NamedTuple):
    """The numbers of the experts that run in a step.

    `by_site` has the sites at which a plan fuses only some of them.
    """

    experts: Sequence[int]
    by_site: Mapping[str, Sequence[int]] = {}

    def at(self, site: str) -> Sequence[int]:
        """The experts that are fused at a site."""
        return self.by_site.get(site, self.experts)

    def left_out(self, expert: int) -> frozenset[str]:
        """The sites at which a running expert is skipped."""
        return frozenset(site for site, experts in self.by_site.items() if expert not in experts)


def running_at(
    steps: Tensor,
    num_experts: int,
    schedule: Schedule | None,
    plan: Callable[[float], Mapping[str, Sequence[int]]] | None,
) -> Running:
    """Select the experts that run at some timesteps, by a schedule, by a plan, or all of them.

    Args:
        steps: timesteps [B].
        num_experts: N.
        schedule: a function from a timestep to the experts that run; None if a plan is given.
        plan: a function from a timestep to the experts by site (`PruningPlan.at`). A batch with
            several timesteps is not pruned.

    Raises:
        AfaError: if a schedule is given and there are several timesteps, or if it selects no
            expert, a duplicate, or an unknown number.
    """
    every = range(num_experts)
    if schedule is None and plan is None:
        return Running(every)
    distinct = steps.unique().tolist()
    if plan is not None:
        return Running(every, plan(distinct[0]) if len(distinct) == 1 else {})
    assert schedule is not None, "either a schedule or a plan is given"
    if len(distinct) > 1:
        raise AfaError(
            "AFA-ENSEMBLE-049",
            "With a schedule, a batch must have one timestep; got "
            f"{', '.join(f'{step:g}' for step in distinct)}. Call the ensemble once for each.",
        )
    picked = list(schedule(distinct[0]))
    if not picked or len(set(picked)) < len(picked) or not set(picked) <= set(every):
        raise AfaError(
            "AFA-ENSEMBLE-050",
            f"The schedule selected the experts {picked} at timestep {distinct[0]:g}. It must "
            f"return at least one number from 0 to {num_experts - 1}, without duplicates.",
        )
    return Running(sorted(picked))
