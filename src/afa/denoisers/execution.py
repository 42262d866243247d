"""How the layers of an expert are run: kept or computed again, where they are or brought over."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor, nn


@dataclass(frozen=True)
class Execution:
    """What a coroutine calls its expert's layers through.

    Attributes:
        checkpoints: whether, for a backward pass, only what goes in and out of a segment is kept,
            and the rest computed again (Chen et al., 2016, arXiv 1604.06174). A segment is what
            lies between two sites.
        device: where layers are run, if they are brought there one at a time; None runs them where
            they are. What was brought is let go of after the segment, in the forward pass and in
            the backward pass.
        source: gives the tensors of a layer on that device, by name; None copies the layer's own.
        skipped: sites whose features nobody asks of this expert: what leads there is not run.
    """

    checkpoints: bool = False
    device: torch.device | None = None
    source: Callable[[nn.Module], dict[str, Tensor]] | None = None
    skipped: Collection[str] = frozenset()

    def segment(self, site: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a function of tensors that leads to a site; None where that site is skipped."""
        if site in self.skipped:
            return None
        if self.checkpoints and torch.is_grad_enabled():
            # experts are frozen and in evaluation mode: there is no random state to bring back
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a layer."""
        if self.device is None:
            return layer(*args, **kwargs)
        if self.source is not None:
            return functional_call(layer, self.source(layer), args, kwargs)
        named = itertools.chain(layer.named_parameters(), layer.named_buffers())
        here = {name: tensor.to(self.device, non_blocking=True) for name, tensor in named}
        return functional_call(layer, here, args, kwargs)


def move_all_but(
    expert: nn.Module, layers: Iterable[nn.Module], device: torch.device | str
) -> None:
    """Bring what is not of these layers to a device."""
    kept = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for tensor in itertools.chain(expert.parameters(), expert.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)


#: every layer where it is, all kept
PLAIN = Execution()
