"""Aggregators in half precision while drawing; their parameters stay in float32."""

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
    """Runs fusion rules in the type of the features that they are given.

    Experts in bfloat16 beside aggregators in float32 would leave most of a step's time on a GPU to
    the aggregators. Whoever trains, averages or saves their parameters has the originals. These are
    copied at every step: nothing tells that a parameter was written through its `.data`, as by the
    moving averages of diffusers, and all of them are copied by a few operations. A copy of this
    object has lowered nothing yet.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Lowered], tuple[()]]:
        return Lowered, ()

    def __len__(self) -> int:
        """How many rules there are copies of."""
        return len(self._kept)

    def refresh(self) -> None:
        """Copy all parameters again, to where they were copied before."""
        for rule, (dtype, tensors) in list(self._kept.items()):
            parameters = dict(rule.named_parameters())
            if _places(parameters) != _places(tensors):
                del self._kept[rule]
                continue
            given = [p.detach() for p in parameters.values()]
            if given:
                torch._foreach_copy_(list(tensors.values()), given)
            self._kept[rule] = (dtype, tensors)

    def of(self, rule: nn.Module, dtype: torch.dtype) -> Any:
        """What is called in the place of a rule; the rule itself where there is nothing to lower.

        Nothing is lowered where gradients are recorded.

        Args:
            rule: of which `can_lower` says whether it takes its type from its parameters.
            dtype: of the features.

        Returns: has the rule's `__call__` and `fuse_some`.
        """
        if torch.is_grad_enabled() or dtype not in HALVES or not getattr(rule, "can_lower", False):
            return rule
        known, tensors = self._kept.get(rule, (None, {}))
        if known != dtype:
            with torch.inference_mode(False):  # or they could not be written again outside of it
                tensors = {name: p.detach().to(dtype) for name, p in rule.named_parameters()}
            self._kept[rule] = (dtype, tensors)
        return _LoweredRule(rule, tensors)


def _places(tensors: dict[str, Any]) -> dict[str, Any]:
    """The names, shapes and devices of tensors."""
    return {name: (tensor.shape, tensor.device) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _LoweredRule:
    """A rule with other parameters than its own."""

    rule: nn.Module
    tensors: dict[str, Tensor]

    def __call__(self, *inputs: Any) -> Any:
        return self._run(None, *inputs)

    def fuse_some(self, *inputs: Any) -> Any:
        return self._run("fuse_some", *inputs)

    def _run(self, method: str | None, *inputs: Any) -> Any:
        named = {f"rule.{name}": tensor for name, tensor in self.tensors.items()}
        return functional_call(_Called(self.rule, method), named, inputs)


class _Called(nn.Module):
    """Calls a method of a rule as a module's own forward pass, which can be given parameters."""

    def __init__(self, rule: nn.Module, method: str | None) -> None:
        super().__init__()
        self.rule, self._method = rule, method

    def forward(self, *inputs: Any) -> Any:
        call: Any = self.rule if self._method is None else getattr(self.rule, self._method)
        return call(*inputs)
