"""Whoever looks at the fusion weights of calls while they are made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from afa.ensemble.hook import Hook

if TYPE_CHECKING:
    from afa.aggregators import Fused

#: called with the timestep [B], the site's name and the fusion weights [B, N, H, W]
WeightsObserver = Callable[[Tensor, str, Tensor], None]


@dataclass(eq=False)
class Observation:
    """An observer of one thread, and what it has not been shown yet of the call that runs.

    A call that is computed a second time, since its prediction was not finite, is shown once.
    """

    observer: WeightsObserver
    immediately: bool = False
    thread: int = field(default_factory=threading.get_ident)
    pending: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)
    num_own: int = 0
    num_foreign: int = 0

    def see(self, timesteps: Tensor, site: str, weights: Tensor) -> None:
        """Take the weights of a site; of calls of other threads, nothing."""
        if self.thread != threading.get_ident():
            self.num_foreign += 1
            return
        self.num_own += 1
        if self.immediately:
            self.observer(timesteps, site, weights)
        else:
            self.pending.append((timesteps, site, weights))

    def begin(self) -> None:
        """Discard what was seen of a call that did not come to its end."""
        if self.thread == threading.get_ident():
            self.pending = []

    def end(self) -> None:
        """Show the observer what was seen of this call."""
        if self.thread == threading.get_ident():
            seen, self.pending = self.pending, []
            for timesteps, site, weights in seen:
                self.observer(timesteps, site, weights)


class Observers(list[Observation]):
    """Those of one ensemble. A copy of it has none: nobody would ever take them off again."""

    def __reduce__(self) -> tuple[type[Observers], tuple[()]]:
        return Observers, ()


class Recorder(Hook):
    """Shows the fusion weights of a step to whoever observes them.

    Args:
        timesteps: of the call, [B].
        on_weights: called whichever thread makes the call.
        observers: those of one thread each.
    """

    def __init__(
        self, timesteps: Tensor, on_weights: WeightsObserver | None, observers: Observers
    ) -> None:
        self._timesteps, self._on_weights, self._observers = timesteps, on_weights, observers

    def fused(self, site: str, fused: Fused) -> None:
        """Show the weights of a site; some rules have none."""
        if fused.weights is not None:
            self.show(site, fused.weights)

    def show(self, site: str, weights: Tensor) -> None:
        """Show fusion weights [B, N, H, W] that need not have been computed in this step."""
        if self._on_weights is not None:
            self._on_weights(self._timesteps, site, weights)
        for observation in tuple(self._observers):
            observation.see(self._timesteps, site, weights)
