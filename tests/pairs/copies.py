"""Copies of a model, of which many are made: it is pickled once and read again for each.

That takes a fraction of the time of `copy.deepcopy`, most of which goes into the dictionaries of
modules. Tensors are copied, what never changes is shared.
"""

from __future__ import annotations

import inspect
import io
import pickle
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from afa.denoisers import Family, PipelineKind
from afa.denoisers.packing import Packing

#: never changes
_SHARED = (Tensor, Family, PipelineKind, Packing, FrozenDict, inspect.Signature)


class Template:
    """What copies are made of.

    Args:
        model: is not changed, and may not be changed afterwards.
    """

    def __init__(self, model: Any) -> None:
        self._apart: list[Any] = []
        file = io.BytesIO()
        _Pickler(file, self._apart).dump(model)
        self._content = file.getvalue()

    def copy(self) -> Any:
        """A copy that shares no tensor with the model."""
        return _Unpickler(self._content, self._apart).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._apart, self._numbers = apart, dict[int, int]()

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, _SHARED):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._apart)
            self._apart.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, apart: list[Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._apart, self._tensors = apart, dict[int, Tensor]()

    def persistent_load(self, number: int) -> Any:
        value = self._apart[number]
        if not isinstance(value, Tensor):
            return value
        if number not in self._tensors:
            self._tensors[number] = _copied(value)
        return self._tensors[number]


def _copied(tensor: Tensor) -> Tensor:
    content = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(content, tensor.requires_grad)
    return content
