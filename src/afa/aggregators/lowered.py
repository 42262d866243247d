"""Run aggregators in half precision without gradients; their parameters stay in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


class Lowered:
    """Runs fusion rules in the data type of their features, on copies of their parameters.

    With experts in bfloat16, aggregators in float32 would take most of a step's time on a GPU.
    Training, averaging and saving use the original parameters in float32. The copies are updated at
    every step, by a few operations for all of them, because a write through `.data`, as by
    diffusers' `EMAModel`, cannot be detected. A copy of this object is empty.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Lowered], tuple[()]]:
        return Lowered, ()

    def __len__(self) -> int:
        """The number of rules whose parameters are copied."""
        return len(self._kept)

    def refresh(self) -> None:
        """Update all copied parameters in place."""
        for rule, (dtype, tensors) in list(self._kept.items()):
            parameters = dict(rule.named_parameters())
            if _layouts(parameters) != _layouts(tensors):
                del self._kept[rule]
                continue
            given = [p.detach() for p in parameters.values()]
            if given:
                torch._foreach_copy_(list(tensors.values()), given)
            self._kept[rule] = (dtype, tensors)

    def of(self, rule: nn.Module, dtype: torch.dtype) -> Any:
        """Return a version of a rule that computes in a half-precision data type.

        Args:
            rule: a fusion rule; only rules with `can_lower` are lowered.
            dtype: the features' data type.

        Returns: an object with the rule's `__call__` and `fuse_some`. It is the rule itself if
            gradients are on, or `dtype` or the rule does not call for lowering.
        """
        if torch.is_grad_enabled() or dtype not in HALVES or not getattr(rule, "can_lower", False):
            return rule
        known, tensors = self._kept.get(rule, (None, {}))
        if known != dtype:
            with torch.inference_mode(False):  # inference tensors could not be updated later
                tensors = {name: p.detach().to(dtype) for name, p in rule.named_parameters()}
            self._kept[rule] = (dtype, tensors)
        return _LoweredRule(rule, tensors)


def _layouts(tensors: dict[str, Any]) -> dict[str, Any]:
    """The names, shapes and devices of tensors."""
    return {name: (tensor.shape, tensor.device) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _LoweredRule:
    """A rule that runs with copies of its parameters."""

    rule: nn.Module
    tensors: dict[str, Tensor]

    def __call__(self, *inputs: Any) -> Any:
        return self._run("__call__", *inputs)

    def fuse_some(self, *inputs: Any) -> Any:
        return self._run("fuse_some", *inputs)

    def _run(self, method: str, *inputs: Any) -> Any:
        named = {f"rule.{name}": tensor for name, tensor in self.tensors.items()}
        return functional_call(_Called(self.rule), named, (method, *inputs))


class _Called(nn.Module):
    """Calls a method of a rule within a module's forward, which `functional_call` requires."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, method: str, *inputs: Any) -> Any:
        return getattr(self.rule, method)(*inputs)
