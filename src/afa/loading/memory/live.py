"""Measure the peak memory of a computation on the meta device, without computing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Callable


def measure(function: Callable[[], object]) -> tuple[int, int]:
    """Return the peak bytes of all tensors that a function creates, and its operations.

    Args:
        function: is run without gradients, usually with tensors on the meta device.
    """
    with torch.no_grad(), _Live() as live, _Attention() as attention:
        function()
    return live.peak, live.flops + attention.flops


def kept_by(function: Callable[[], object]) -> int:
    """Return the bytes of all tensors saved for the backward pass, without parameters.

    Args:
        function: is run with gradients, usually with tensors on the meta device.
    """
    kept: dict[StorageWeakRef, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            held.append(tensor)  # so that no other tensor gets its storage
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.enable_grad(),
        _Attention(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        held.append(function())  # type: ignore[arg-type]
    return sum(kept.values())


class _Live(TorchDispatchMode):
    """Counts floating-point operations, and the bytes of storages while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.flops = 0
        self._living: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        self._living = {ref: size for ref, size in self._living.items() if not ref.expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (ref := _storage(leaf)) not in given:
                self._living.setdefault(ref, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(self._living.values()))
        return out


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class _Attention(TorchFunctionMode):
    """Attention with the memory of fused kernels, which never store all scores at once."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            query, value = named["query"], named["value"]
            # two products: queries with keys, and scores with values
            self.flops += 2 * query.numel() * value.shape[-2] * 2
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
