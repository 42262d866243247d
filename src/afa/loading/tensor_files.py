"""Read and write safetensors files tensor by tensor, with one tensor in memory.

The library's writer needs all tensors at once, and its reader maps whole files into memory, where
every page read counts. So this module reads and writes the format itself.
Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from afa.errors import AfaError
from afa.files import replaced
from afa.loading.weights import check_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in a file."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a safetensors file; `read` reads its values."""

    file: Path
    offset: int

    def read(self) -> Tensor:
        """Read the values into new memory.

        Raises:
            AfaError: if the file has become shorter since its header was read.
        """
        content = torch.empty(self.num_bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            view = content.numpy().data
            while view:
                count = stream.readinto(view)
                if not count:
                    raise AfaError(
                        "AFA-MERGE-038",
                        f"'{self.file}' became shorter while it was read. Do not change it "
                        "meanwhile.",
                    )
                view = view[count:]
        return content.view(self.dtype).reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: name -> tensor.

    Raises:
        AfaError: if the file is damaged, or has a tensor of an unsupported dtype.
    """
    header = check_safetensors(file)  # also checks lengths and offsets
    tensors = {}
    for name, entry in header.tensors.items():
        if entry["dtype"] not in _DTYPES:
            raise AfaError(
                "AFA-MERGE-039",
                f"'{name}' in '{file}' has dtype {entry['dtype']}; supported are "
                f"{', '.join(_DTYPES)}. Use a checkpoint of another precision.",
            )
        shape, offset = tuple(entry["shape"]), header.start + entry["data_offsets"][0]
        tensors[name] = StoredTensor(_DTYPES[entry["dtype"]], shape, file, offset)
    return tensors


def writing_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The order of tensors in a file: widest dtype first, so that all are aligned."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def header_of(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose tensors follow in `writing_order`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in writing_order(specs):
        spec = specs[name]
        end = start + spec.num_bytes
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, always with the same bytes.

    The order of the metadata in the safetensors library's own files is random. The library also
    needs a copy of all tensors in memory; here, tensors of accelerators are copied one by one.

    Args:
        path: replaced if it exists.
        tensors: by name, on any device; may share memory.
        metadata: metadata of the file.
    """
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    values = (tensors[name].detach().cpu() for name in writing_order(specs))
    with replaced(path) as stream:
        for _ in _write(stream, specs, values, metadata):
            pass


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str],
) -> Iterator[str]:
    """Write a safetensors file tensor by tensor, and sync it to disk at the end.

    Args:
        path: a new file, with a temporary name.
        specs: dtypes and shapes of all tensors.
        tensors: their values, in `writing_order`.
        metadata: metadata of the file.

    Yields: the name of each written tensor.
    """
    with path.open("xb") as stream:
        yield from _write(stream, specs, tensors, metadata)
        stream.flush()
        os.fsync(stream.fileno())


def _write(
    stream: BinaryIO,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str],
) -> Iterator[str]:
    stream.write(header_of(specs, metadata))
    for name in writing_order(specs):
        tensor = next(tensors)  # zip would keep the previous one in memory
        assert (tensor.dtype, tuple(tensor.shape)) == (specs[name].dtype, specs[name].shape)
        if tensor.numel():
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        del tensor  # frees it before the next one is computed
        yield name
