"""Detect denoising loops from single denoiser calls, and keep what their steps reuse."""

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

#: one feature for all experts, or one per expert
Features = list[Tensor]


@dataclass
class Kept:
    """The results of a full step: its latent, features and fusion weights by site, and prediction.

    Features of sites that will not be reused are placeholders with the right shape.
    """

    latent: Tensor
    features: dict[str, Features] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    prediction: Tensor | None = None


@dataclass
class Loop:
    """The state of one denoising loop.

    Attributes:
        timestep: the timestep of the last call.
        latent: a copy of the last call's latent.
        num_calls: the number of calls, including the current one.
        since_full: the number of calls since the last full step.
        kept: the results of the last full step.
        graph: the CUDA graph of its steps, a `StepGraph`, if they are recorded.
        is_guarded: whether the guard checks every feature from now on.
        running: the experts that ran at the last call.
    """

    timestep: float
    latent: Tensor
    num_calls: int = 1
    since_full: int = 0
    kept: Kept | None = None
    graph: Any = None
    is_guarded: bool = False
    running: Running | None = None

    def runs(self, running: Running) -> None:
        """Note which experts run in this call; discard kept results if other experts made them.

        Features and fusion weights of other experts cannot be reused: the weights are zero for
        experts that did not run.
        """
        if self.running is not None and self.running != running:
            self.kept = None
        self.running = running


class Loops:
    """Assign the calls of a denoiser to denoising loops, separately for each thread.

    A copy is empty, because CUDA graphs belong to the denoiser whose steps were recorded.
    """

    def __init__(self) -> None:
        # by prompt tensor, then by thread
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
        """Return the loop that this call continues, or a new one.

        A call continues a loop if it has the same prompt tensor (the same object) as the last call,
        one timestep for the batch that is lower than the last one, and a latent of the same shape
        and type that has changed by less than its own size. Otherwise a new loop begins, and
        everything computed from the prompt is discarded.

        Args:
            prompt: the text embedding, or another tensor that stays the same object in a loop.
            steps: timesteps [B].
            latent: the latent that the denoiser receives, [B, ...].
            agree: combines the decisions of several processes; see `Exchange.any_of`.
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
    """Whether two tensors have the same shape, data type and device."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def has_moved(now: Tensor, then: Tensor, share: float) -> bool:
    """Whether a latent has changed by more than this fraction of its size (relative L1 distance).

    Only values that changed count, because some models also receive a constant mask or picture.
    """
    now, then = now.float(), then.float()
    size = then[now != then].abs().sum()
    return bool((now - then).abs().sum() > share * size)
