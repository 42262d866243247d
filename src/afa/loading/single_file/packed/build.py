"""Build a denoiser whose linear layers keep the quantised weights of its file.

The conversion to the library's names only renames tensors and moves rows. So it is applied to the
quantised bytes, and once more to a table with a line per row: the format and the scale of that row.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from afa.denoisers.packed import FLOAT8, PackedLinear, unpacker
from afa.files import read_json
from afa.loading.components import require_complete
from afa.loading.single_file.conversion import converted, expected_shapes, model_class_of
from afa.loading.single_file.layout import described_kind
from afa.loading.single_file.packed.read import file_tensors
from afa.loading.trust.gguf import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.loading.single_file.packed.read import FileTensor


def read_packed(
    path: Path,
    names: Mapping[str, str],
    config: Path,
    dtype: torch.dtype,
    *,
    is_diffusers: bool,
) -> Any | None:
    """Read a denoiser with quantised weights from a single file.

    Linear layers whose weights are quantised keep them (`afa.denoisers.packed`). All other
    parameters, also quantised convolutions, are dequantised and have the given type.

    Args:
        names: name without the denoiser's prefix -> name in the file.
        config: the pipeline folder that describes it.
        dtype: in which the model computes.
        is_diffusers: whether it has the library's names.

    Returns: the model for inference, or None if it has no quantised matrices.

    Raises:
        AfaError: if the file lacks parameters, or the package for GGUF files is missing.
    """
    kind = described_kind(config)
    part = kind.denoiser
    if kind.family.model_class.__module__.partition(".")[0] != "diffusers":
        return None  # a conversion by another package may compute with the weights
    found = file_tensors(path, names.values())
    tensors = {rest: found[name] for rest, name in names.items()}
    formats = sorted({str(each.quantisation) for each in tensors.values() if each.can_pack})
    if not formats:
        return None
    given = {rest: t.read_rows() if t.can_pack else t.read() for rest, t in tensors.items()}
    tables = {rest: _table(tensors[rest], given[rest], formats) for rest in given}
    # without copies: only the tables of packed weights are used
    state = converted(part, given, config, is_diffusers=is_diffusers)
    rows = converted(part, tables, config, is_diffusers=is_diffusers)
    del given
    expected = expected_shapes(part, config)
    require_complete([name for name in expected if name not in state], path)
    with init_empty_weights():
        model = model_class_of(part, config).from_config(read_json(config / part / "config.json"))
    packed = {name for name in expected if not rows[name].is_meta}
    has_scales = {t.quantisation for t in tensors.values() if t.scale is not None}
    dense = {name: state.pop(name).to(dtype) for name in expected if name not in packed}
    for name in sorted(packed):
        own = _Packed(state.pop(name), rows[name], formats, expected[name], has_scales)
        place, _, last = name.rpartition(".")
        layer = model.get_submodule(place)
        if type(layer) is nn.Linear and last == "weight":
            parent, _, child = place.rpartition(".")
            bias = dense.pop(f"{place}.bias", None)
            setattr(model.get_submodule(parent), child, own.layer(bias, dtype))
        else:
            dense[name] = own.read().to(dtype)
    model.load_state_dict(dense, strict=False, assign=True)
    model = nn.Module.to(model, dtype)  # the library's own `to` warns about parts in float32
    require_complete([name for name, p in model.named_parameters() if p.is_meta], path)
    model.requires_grad_(False)
    return model.eval()


def _table(tensor: FileTensor, data: Tensor, formats: list[str]) -> Tensor:
    """Return the format and the scale of every row of a packed weight, float32 [rows, 2]."""
    if not tensor.can_pack:
        return torch.empty(tensor.shape, device="meta")
    scales = tensor.row_scales()
    table = torch.ones(len(data), 2)
    table[:, 0] = formats.index(str(tensor.quantisation))
    if scales is not None:
        table[:, 1:] = scales
    return table


class _Packed:
    """A packed weight after the conversion."""

    def __init__(
        self,
        data: Tensor,
        table: Tensor,
        formats: list[str],
        shape: tuple[int, ...],
        has_scales: set[str | None],
    ) -> None:
        (number,) = table[:, 0].unique().tolist()
        self._format = formats[int(number)]
        self._shape = shape
        self._data = data.contiguous()
        block = BY_NAME.get(self._format)
        size = prod(shape) if block is None else prod(shape) // block.elements * block.num_bytes
        assert self._data.numel() == size, "the conversion must only move rows"
        assert len(table) in (1, shape[0])
        is_scaled = self._format in FLOAT8 and self._format in has_scales
        self._scale = table[:, 1:].contiguous() if is_scaled else None

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """Make the linear layer with this weight."""
        shape = (self._shape[0], self._shape[1])
        return PackedLinear(self._data, self._scale, bias, self._format, shape, dtype)

    def read(self) -> Tensor:
        """Dequantise to float32."""
        bits = None if self._scale is None else self._scale.view(torch.int32)
        return unpacker(self._format)(self._data, bits, self._shape)
