"""Observers of the fusion weights while an ensemble is called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from afa.ensemble.hook import Hook

if TYPE_CHECKING:
    from afa.aggregators import Fused

#: a function of the timesteps [B], the site's name and the fusion weights [B, N, H, W]
WeightsObserver = Callable[[Tensor, str, Tensor], None]


@dataclass(eq=False)
class Observation:
    """An observer of one thread, and the weights that it has not received yet.

    The observer gets the weights at the end of a call. So a step that is repeated because its
    prediction was not finite is shown once.
    """

    observer: WeightsObserver
    immediately: bool = False
    thread: int = field(default_factory=threading.get_ident)
    pending: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)
    num_own: int = 0
    num_foreign: int = 0

    def see(self, timesteps: Tensor, site: str, weights: Tensor) -> None:
        """Note the weights of a site; calls of other threads are only counted."""
        if self.thread != threading.get_ident():
            self.num_foreign += 1
            return
        self.num_own += 1
        if self.immediately:
            self.observer(timesteps, site, weights)
        else:
            self.pending.append((timesteps, site, weights))

    def begin(self) -> None:
        """Discard the weights of an earlier call that did not finish."""
        if self.thread == threading.get_ident():
            self.pending = []

    def end(self) -> None:
        """Call the observer with the weights of this call."""
        if self.thread == threading.get_ident():
            seen, self.pending = self.pending, []
            for timesteps, site, weights in seen:
                self.observer(timesteps, site, weights)


class Observers(list[Observation]):
    """The observers of one ensemble. A copy has none, because nothing would remove them."""

    def __reduce__(self) -> tuple[type[Observers], tuple[()]]:
        return Observers, ()


class Recorder(Hook):
    """Pass the fusion weights of a step to the observers.

    Args:
        timesteps: the timesteps of the call, [B].
        on_weights: an observer of the calls of all threads.
        observers: observers of one thread each.
    """

    def __init__(
        self, timesteps: Tensor, on_weights: WeightsObserver | None, observers: Observers
    ) -> None:
        self._timesteps, self._on_weights, self._observers = timesteps, on_weights, observers

    def fused(self, site: str, fused: Fused) -> None:
        """Pass the weights of a site to the observers; some rules have no weights."""
        if fused.weights is not None:
            self.show(site, fused.weights)

    def show(self, site: str, weights: Tensor) -> None:
        """Pass fusion weights [B, N, H, W] to the observers, also those of an earlier step."""
        if self._on_weights is not None:
            self._on_weights(self._timesteps, site, weights)
        for observation in tuple(self._observers):
            observation.see(self._timesteps, site, weights)
