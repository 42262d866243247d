"""What the modules of this package ask of an ensemble, so that none of them needs the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from afa.aggregators.lowered import Lowered
    from afa.denoisers import Execution, Family, Site, Widths
    from afa.ensemble.observation import Observers
    from afa.ensemble.references import ExpertReference


class Ensemble(Protocol):
    """N experts and their fusion rules; `EnsembleDenoiser` is one."""

    family: Family
    experts: Any
    sites: tuple[Site, ...]
    aggregators: Any
    widths: Widths
    execution: Execution
    lowered: Lowered
    observers: Observers
    references: Sequence[ExpertReference] | None

    def rule_at(self, site: str) -> nn.Module:
        """The fusion rule of a site."""


def expert_names(ensemble: Ensemble) -> list[str]:
    """What the experts are called: as their checkpoints, or by number where there are none."""
    if ensemble.references is None:
        return [str(n) for n in range(len(ensemble.experts))]
    return [reference.name for reference in ensemble.references]
