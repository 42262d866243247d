"""Denoising loops as a denoiser sees them: a call at a time, and what each takes over."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afa.denoisers.prompt import forget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afa.ensemble.running import Running

#: one for all experts, or one for each
Features = list[Tensor]


@dataclass
class Kept:
    """What a step that was computed as a whole has left.

    Its latent, and by site what came out; of sites whose features nobody will ask for there is only
    the shape.
    """

    latent: Tensor
    features: dict[str, Features] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    prediction: Tensor | None = None


@dataclass
class Loop:
    """One denoising loop, so far.

    Attributes:
        timestep: its last one.
        latent: a copy of the one that it was last called with.
        num_calls: up to and with the one that runs.
        since_whole: calls since everything was computed.
        kept: of the last call that computed everything.
        graph: of its steps, where they are CUDA graphs.
        is_guarded: whether every feature of its steps is looked at from now on.
        running: the experts that ran at its last call.
    """

    timestep: float
    latent: Tensor
    num_calls: int = 1
    since_whole: int = 0
    kept: Kept | None = None
    graph: Any = None  # a `StepGraph`, which `graphs` makes and keeps here
    is_guarded: bool = False
    running: Running | None = None

    def runs(self, running: Running) -> None:
        """Note which experts run in this call; discard the features that others have made.

        A feature that some experts have made says nothing about those that run now, and neither do
        fusion weights, which are zero for experts that did not run.
        """
        if self.running is not None and self.running != running:
            self.kept = None
        self.running = running


class Loops:
    """Tells from the calls of a denoiser which loop each belongs to; threads have loops apart.

    A copy knows none: graphs of a loop are of the denoiser whose steps were recorded.
    """

    def __init__(self) -> None:
        # by prompt, and then by thread
        self._loops: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Loops], tuple[()]]:
        return Loops, ()

    def __iter__(self) -> Iterator[Loop]:
        return (loop for of_prompt in self._loops.values() for loop in of_prompt.values())

    def of(
        self,
        prompt: Tensor,
        steps: Tensor,
        latent: Tensor,
        agree: Callable[[bool], bool] = bool,
    ) -> Loop:
        """The loop that this call continues, or a new one.

        A call continues a loop if it has the prompt of an earlier call, as the same object; one
        timestep for all that is below that call's; and a latent that can have come from that
        call's: of the same shape and type, and changed by less than its own size. Otherwise another
        picture has begun, whose caller happened to hold the same prompt: the earlier loop was left
        before its end. Where a loop begins, what was computed of the prompt is discarded.

        Args:
            prompt: embedding of the text, or whatever else stays the same object in a loop.
            steps: timesteps [B].
            latent: what the denoiser is given, [B, ...].
            agree: makes one decision of those of several processes; see `Exchange.any_of`.
        """
        distinct = steps.unique().tolist()
        step = distinct[0] if len(distinct) == 1 else -math.inf
        of_prompt = self._loops.get(prompt)
        if of_prompt is None:
            of_prompt = self._loops[prompt] = {}
        thread = threading.get_ident()
        loop = of_prompt.get(thread)
        continues = (
            loop is not None
            and -math.inf < step < loop.timestep
            and is_alike(loop.latent, latent)
            and not has_moved(latent, loop.latent, 1.0)
        )
        if agree(not continues):
            forget(prompt)
            loop = of_prompt[thread] = Loop(step, latent.clone())
            return loop
        loop.timestep, loop.num_calls, loop.latent = step, loop.num_calls + 1, latent.clone()
        return loop


def is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, type and device."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def has_moved(now: Tensor, then: Tensor, share: float) -> bool:
    """Whether a latent has changed by more than this share of what it was (relative L1 distance).

    Only places that have changed at all count: some models are given a mask or a picture besides,
    which stay the same.
    """
    now, then = now.float(), then.float()
    size = then[now != then].abs().sum()
    return bool((now - then).abs().sum() > share * size)
