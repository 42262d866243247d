"""How an expert's layers run: with or without checkpointing, offloading and skipped sites."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from afa.machine.devices import may_overlap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor, nn


@dataclass(frozen=True)
class Execution:
    """Runs an expert's layers for its coroutine.

    Attributes:
        checkpoints: whether gradient checkpointing is on (Chen et al., 2016, arXiv 1604.06174): for
            the backward pass, only the inputs of a segment are stored, and the segment is computed
            again. A segment is the computation between two sites.
        device: the device to which layers are copied one at a time to run; None runs each layer
            where it is. The copies are freed after the segment, also in the backward pass.
        source: returns the tensors of a layer by name, on that device; None copies the layer's own.
        skipped: sites whose features are not needed from this expert; their segments do not run.
    """

    checkpoints: bool = False
    device: torch.device | None = None
    source: Callable[[nn.Module], dict[str, Tensor]] | None = None
    skipped: Collection[str] = frozenset()

    def segment(self, site: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a function of tensors that computes a site's feature; None if the site is skipped."""
        if site in self.skipped:
            return None
        if self.checkpoints and torch.is_grad_enabled():
            # experts are frozen and in evaluation mode, so there is no random state to restore
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a layer, on the execution device if one is set."""
        if self.device is None:
            return layer(*args, **kwargs)
        if self.source is not None:
            return functional_call(layer, self.source(layer), args, kwargs)
        named = itertools.chain(layer.named_parameters(), layer.named_buffers())
        overlaps = may_overlap(torch.device("cpu"), self.device)
        here = {name: tensor.to(self.device, non_blocking=overlaps) for name, tensor in named}
        return functional_call(layer, here, args, kwargs)


def move_all_but(
    expert: nn.Module, layers: Iterable[nn.Module], device: torch.device | str
) -> None:
    """Move all parameters and buffers of an expert, except those of these layers, to a device."""
    kept = {
        id(tensor)
        for layer in layers
        for tensor in itertools.chain(layer.parameters(), layer.buffers())
    }
    for tensor in itertools.chain(expert.parameters(), expert.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)


#: every layer where it is, without checkpointing or skipping
PLAIN = Execution()
