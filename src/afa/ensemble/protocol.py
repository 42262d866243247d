"""The interface of an ensemble that this package needs, without importing `EnsembleDenoiser`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from afa.aggregators.lowered import Lowered
    from afa.denoisers import Execution, Family, Site, Widths
    from afa.ensemble.observation import Observers
    from afa.ensemble.references import Provenance


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
    provenance: Provenance

    def rule_at(self, site: str) -> nn.Module:
        """The fusion rule of a site."""


def expert_names(ensemble: Ensemble) -> list[str]:
    """The names of the experts' checkpoints, or their numbers if they have no checkpoints."""
    return ensemble.provenance.names or [str(n) for n in range(len(ensemble.experts))]
