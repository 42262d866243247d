"""Aggregators in half precision while drawing; their parameters stay in float32."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.func import functional_call

from afa.prompt import versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


class Lowered:
    """Runs fusion rules in the type of the features that they are given.

    Experts in bfloat16 beside aggregators in float32 would leave most of a step's time on a GPU to
    the aggregators. Their parameters are copied once; whoever trains or saves them has the
    originals.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakKeyDictionary()

    def of(self, rule: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
        """What is called in the place of a rule; the rule itself where there is nothing to lower.

        Args:
            rule: of which `can_lower` says whether it takes its type from its parameters.
            dtype: of the features.
        """
        if dtype not in HALVES or not getattr(rule, "can_lower", False):
            return rule
        parameters = dict(rule.named_parameters())
        # a parameter that is trained has another version, one that is moved or loaded another place
        state = [dtype, *(p.data_ptr() for p in parameters.values()), *versions(rule)]
        known, tensors = self._kept.get(rule, (None, {}))
        if known != state:
            tensors = {name: p.detach().to(dtype) for name, p in parameters.items()}
            self._kept[rule] = (state, tensors)
        return partial(_call, rule, tensors)


def _call(rule: nn.Module, tensors: dict[str, Tensor], *inputs: Any) -> Any:
    return functional_call(rule, tensors, inputs)
