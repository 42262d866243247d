"""Stream the experts' layers from a file: each layer is read when it runs.

Memory holds only the layer that runs and the next few, however many experts there are. While one
layer computes, a thread reads the next ones.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from afa.errors import AfaError
from afa.machine.devices import may_overlap

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_ALIGNMENT = 64  # bytes, for vector instructions


@dataclass(frozen=True)
class _Place:
    """The position of a tensor within its layer's bytes."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int


@dataclass(frozen=True)
class _Layer:
    """The position of a layer in the file."""

    offset: int
    size: int
    places: tuple[_Place, ...]


class LayerStream:
    """A temporary file of layers, with read-ahead.

    The order of the layers is learned from the previous pass: a thread reads the layers that
    followed the current one last time. The file has no name, so the system removes it however the
    process ends.

    Args:
        device: the device on which layers run.
        ahead: how many layers are read ahead.
        folder: the folder of the file; None uses the system's folder for temporary files.
    """

    def __init__(
        self, device: torch.device | str = "cpu", *, ahead: int = 2, folder: Path | None = None
    ) -> None:
        self._device, self._ahead = torch.device(device), ahead
        self._folder = tempfile.gettempdir() if folder is None else str(folder)
        #: the temporary file, which has no name
        self.file: Any = tempfile.TemporaryFile(dir=self._folder, prefix="afa-")  # noqa: SIM115
        self._reading = threading.Lock()
        self._size = 0
        self._layers: dict[nn.Module, _Layer] = {}
        self._after: dict[nn.Module, nn.Module] = {}
        self._last: nn.Module | None = None
        #: the layers that are read ahead
        self.reading: OrderedDict[nn.Module, Future[dict[str, Tensor]]] = OrderedDict()
        # by tensor left in a layer: its offset and size; a nested layer is in the file twice
        self._bytes: dict[Tensor, tuple[int, int]] = {}
        #: the thread that reads ahead
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="afa-layers")
        self._release = weakref.finalize(self, _release, self.reader, self.file)

    def __reduce__(self) -> NoReturn:
        raise AfaError(
            "AFA-ENSEMBLE-041",
            "Streamed experts cannot be copied or pickled, because their layers are in a file. "
            "Call stop_offloading() first.",
        )

    def add(self, layers: Iterable[nn.Module]) -> None:
        """Move layers to the file, and replace their parameters by tensors on the meta device.

        Raises:
            AfaError: if the disk is too small.
        """
        for layer in layers:
            if layer in self._layers:
                continue
            tensors = dict(itertools.chain(layer.named_parameters(), layer.named_buffers()))
            places, end = [], 0
            for name, tensor in tensors.items():
                begin = -(-end // _ALIGNMENT) * _ALIGNMENT
                end = begin + tensor.numel() * tensor.element_size()
                places.append(_Place(name, tensor.dtype, tensor.shape, begin, end))
            free = shutil.disk_usage(self._folder).free
            if free < end:
                raise AfaError(
                    "AFA-ENSEMBLE-042",
                    f"'{self._folder}' has {free / 1e9:.2f} GB free, but {end / 1e9:.2f} GB more "
                    "are needed to stream the experts' layers. Name a folder on another disk.",
                )
            entry = _Layer(self._size, end, tuple(places))
            for place in places:
                content = self._content(tensors[place.name])
                self.file.seek(entry.offset + place.begin)
                self.file.write(content.numpy().data)
            self.file.flush()
            self.file.truncate(entry.offset + end)  # the last tensor may be empty
            self._layers[layer] = entry
            self._size += -(-end // _ALIGNMENT) * _ALIGNMENT
            _replace(layer, {name: tensor.to("meta") for name, tensor in tensors.items()})
            left = dict(itertools.chain(layer.named_parameters(), layer.named_buffers()))
            for place in places:
                where = (entry.offset + place.begin, place.end - place.begin)
                self._bytes[left[place.name]] = where

    def _content(self, tensor: Tensor) -> Tensor:
        """The bytes of a tensor, from memory or from the file."""
        if tensor in self._bytes:
            return self._bytes_at(*self._bytes[tensor])
        return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)

    def __call__(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a layer by name, on the device, from the file or from memory."""
        if layer not in self._layers:
            named = itertools.chain(layer.named_parameters(), layer.named_buffers())
            return {name: tensor.to(self._device) for name, tensor in named}
        if self._last is not None:
            self._after[self._last] = layer
        self._last = layer
        future = self.reading.pop(layer, None)
        tensors = self.read(layer) if future is None else future.result()
        self._read_ahead(layer)
        if self._device.type == "cpu":
            return tensors
        overlaps = may_overlap(torch.device("cpu"), self._device)
        return {name: t.to(self._device, non_blocking=overlaps) for name, t in tensors.items()}

    def _read_ahead(self, layer: nn.Module) -> None:
        wanted: list[nn.Module] = []
        following = self._after.get(layer)
        while following is not None and len(wanted) < self._ahead and following not in wanted:
            wanted.append(following)
            following = self._after.get(following)
        for stale in [key for key in self.reading if key not in wanted]:
            del self.reading[stale]  # the order of the layers has changed
        for key in wanted:
            if key not in self.reading and key is not layer:
                self.reading[key] = self.reader.submit(self.read, key)

    def read(self, layer: nn.Module) -> dict[str, Tensor]:
        """Read the tensors of a layer, by name, from the file into memory."""
        entry = self._layers[layer]
        content = self._bytes_at(entry.offset, entry.size)
        return {
            place.name: content[place.begin : place.end].view(place.dtype).view(place.shape)
            for place in entry.places
        }

    def _bytes_at(self, offset: int, size: int) -> Tensor:
        content = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        view, done = content.numpy().data, 0
        while done < size:
            count = _read_at(self.file, self._reading, view[done:], offset + done)
            if count == 0:
                raise AfaError(
                    "AFA-ENSEMBLE-043",
                    "The temporary file of streamed layers is shorter than what was written. The "
                    "disk may be full: name a folder on another disk.",
                )
            done += count
        return content

    def close(self) -> None:
        """Read all layers back into memory, on the CPU, and delete the file."""
        self.reading.clear()
        for layer in self._layers:
            _replace(layer, {name: t.clone() for name, t in self.read(layer).items()})
        self._layers.clear()
        self._bytes.clear()
        self.reader.shutdown()
        self._release()


def _read_at(file: Any, lock: threading.Lock, content: memoryview, offset: int) -> int:
    """Read bytes at a place of a file; returns their number, 0 at its end."""
    if sys.platform != "win32":
        return os.preadv(file.fileno(), [content], offset)
    return _read_from(file, lock, content, offset)


def _read_from(file: Any, lock: threading.Lock, content: memoryview, offset: int) -> int:
    """As `_read_at`, on systems where only one thread at a time can read at a place."""
    with lock:
        file.seek(offset)
        count: int = file.readinto(content)
    return count


def _release(reader: ThreadPoolExecutor, file: Any) -> None:
    # this may run in the reader thread, which cannot wait for itself; nothing is being read then,
    # because a running read keeps a reference to the stream
    reader.shutdown(wait=False)
    file.close()


def _replace(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace a layer's parameters and buffers by other tensors."""
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = layer.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor
