"""The hooks of a step, in their order. A new one is a file of its own and an entry here."""

from __future__ import annotations

from afa.ensemble.bias import Steering
from afa.ensemble.caching.shortcut import Shortcut
from afa.ensemble.guard import Guard
from afa.ensemble.hook import Hook
from afa.ensemble.observation import Recorder
from afa.ensemble.placement.devices import Devices
from afa.ensemble.placement.exchange import Exchange

#: From the experts to the fused feature. Features are first gathered from other devices and
#: processes, because all else needs those of all experts. The guard comes next, so that nobody
#: fuses, keeps or shows values that are not finite. The bias belongs to the fusion itself. The
#: cache then keeps what was fused, and the recorder is last, because it shows what all others made.
HOOKS: tuple[type[Hook], ...] = (Devices, Exchange, Guard, Steering, Shortcut, Recorder)


def in_order(*hooks: Hook | None) -> tuple[Hook, ...]:
    """Hooks in the order of `HOOKS`, without None."""
    return tuple(hook for kind in HOOKS for hook in hooks if isinstance(hook, kind))
