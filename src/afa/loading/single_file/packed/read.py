"""Read the tensors of single files with quantised weights: dequantised, or as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from afa.denoisers.packed import FLOAT8, unpacker
from afa.errors import AfaError
from afa.loading.single_file.packed.layout import layout_of
from afa.loading.tensor_files import StoredTensor
from afa.loading.trust.gguf import BY_NAME
from afa.loading.weights import check_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

_PLAIN = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, **FLOAT8},
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a single file, which may be quantised.

    Attributes:
        stored: its bytes as they are in the file.
        quantisation: its type, if it is quantised; see `afa.denoisers.packed.unpacker`.
        shape: after dequantisation.
        scale: of a float8 weight, or None.
    """

    stored: StoredTensor
    quantisation: str | None
    shape: tuple[int, ...]
    scale: StoredTensor | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.stored.num_bytes

    @property
    def file(self) -> Path:
        """The file that contains it."""
        return self.stored.file

    @property
    def can_pack(self) -> bool:
        """Whether it is a quantised matrix."""
        return self.quantisation is not None and len(self.shape) == 2

    def row_scales(self) -> Tensor | None:
        """Read the scales as float32 [rows, 1]; None without scales.

        Raises:
            AfaError: if one is not finite.
        """
        if self.scale is None:
            return None
        found = self.scale.read().float()
        if not torch.isfinite(found).all():
            raise AfaError(
                "AFA-LOAD-114",
                f"A scale of float8 weights in '{self.file}' is not finite (NaN or infinity). "
                "Download the file again.",
            )
        return found.reshape(-1, 1).expand(self.shape[0], 1).contiguous()

    def read(self) -> Tensor:
        """Read the values: of GGUF blocks and scaled weights in float32, others as they are stored.

        Raises:
            AfaError: if the file has become shorter, a scale is not finite, or the package for GGUF
                files is missing.
        """
        self._require_package()
        data = self.stored.read()
        if self.quantisation is None:
            return data.reshape(self.shape)
        if self.quantisation in FLOAT8 and self.scale is None:
            return data.view(FLOAT8[self.quantisation]).reshape(self.shape)
        rows = self.row_scales()
        bits = None if rows is None else rows.view(torch.int32)
        return unpacker(self.quantisation)(data.view(torch.uint8), bits, self.shape)

    def _require_package(self) -> None:
        if self.quantisation is not None and self.quantisation not in FLOAT8:
            require_gguf(self.file)

    def read_rows(self) -> Tensor:
        """Read the stored bytes, [rows, bytes per row] if no block is in two rows, else [1, bytes].

        Raises:
            AfaError: if the file has become shorter, or the package for GGUF files is missing.
        """
        self._require_package()
        data = self.stored.read().view(torch.uint8).reshape(-1)
        block = 1 if self.quantisation in FLOAT8 else BY_NAME[str(self.quantisation)].elements
        return data.reshape(1 if self.shape[-1] % block else self.shape[0], -1)


def file_tensors(file: Path, names: Iterable[str] | None = None) -> dict[str, FileTensor]:
    """Return the tensors of a single file by name, without those of the quantisation.

    Args:
        names: of the tensors; None returns all.

    Raises:
        AfaError: see `layout_of`.
    """
    header, layout = check_weights(file), layout_of(file)
    others = {*layout.scales.values(), *layout.unused}

    def stored(name: str) -> StoredTensor:
        entry = header.tensors[name]
        start, end = entry["data_offsets"]
        dtype = _PLAIN.get(entry["dtype"])
        if dtype is None or layout.quantised.get(name) is not None:
            return StoredTensor(torch.uint8, (end - start,), file, header.start + start)
        return StoredTensor(dtype, tuple(entry["shape"]), file, header.start + start)

    found = {}
    for name in header.tensors if names is None else names:
        if name not in others:
            kind, scale = layout.quantised.get(name), layout.scales.get(name)
            shape = tuple(header.tensors[name]["shape"])
            own = None if scale is None else stored(scale)
            found[name] = FileTensor(stored(name), kind, shape, own)
    return found


def require_gguf(file: Path) -> None:
    """Check that the weights of a GGUF file can be dequantised.

    Raises:
        AfaError: if the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise AfaError(
            "AFA-LOAD-119",
            f"'{file}' is a GGUF file; reading its weights requires the package gguf. Install it "
            "with pip install 'afa[gguf]'.",
        ) from None


def read_tensors(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Read tensors of a single file; quantised ones are dequantised.

    Args:
        names: the names of the result -> the names in the file.

    Raises:
        AfaError: see `file_tensors` and `FileTensor.read`.
    """
    layout = layout_of(path)
    if layout.is_gguf:
        found = file_tensors(path, names.values())
        return {rest: found[name].read() for rest, name in names.items()}
    scaled = file_tensors(path, [name for name in names.values() if name in layout.scales])
    with safe_open(path, framework="pt") as opened:
        return {
            rest: scaled[name].read() if name in scaled else opened.get_tensor(name)
            for rest, name in names.items()
        }
