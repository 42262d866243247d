"""The hooks of a step, in their order. A new hook is a file of its own and an entry here."""

from __future__ import annotations

from afa.ensemble.bias import Steering
from afa.ensemble.caching.shortcut import Shortcut
from afa.ensemble.conversion import Conversion
from afa.ensemble.guard import Guard
from afa.ensemble.hook import Hook
from afa.ensemble.observation import Recorder
from afa.ensemble.placement.devices import Devices
from afa.ensemble.placement.exchange import Exchange
from afa.ensemble.prompt_noise import PromptNoise
from afa.ensemble.regions import Regions

#: From the experts to the fused feature. Features are first gathered from other devices and
#: processes, because the other hooks need those of all experts. Then predictions of different kinds
#: become one kind. The guard is next, so that no hook fuses, caches or shows non-finite values. The
#: noise on the prompt and the bias are part of the
#: fusion. The cache then keeps the fused feature, and fuses where it skips layers. Regions fuse at
#: the other sites. The recorder is last, because it shows the final weights.
HOOKS: tuple[type[Hook], ...] = (
    Devices,
    Exchange,
    Conversion,
    Guard,
    PromptNoise,
    Steering,
    Shortcut,
    Regions,
    Recorder,
)


def in_order(*hooks: Hook | None) -> tuple[Hook, ...]:
    """Hooks in the order of `HOOKS`, without None."""
    return tuple(hook for kind in HOOKS for hook in hooks if isinstance(hook, kind))
