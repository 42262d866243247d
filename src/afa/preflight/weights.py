"""Check the experts' weights for non-finite values and for near-duplicates.

Holds one tensor of each expert in memory at a time.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.loading.finding import Finding
from afa.loading.single_file.packed.read import file_tensors
from afa.loading.tensor_files import read_header
from afa.merging.method import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.loading.single_file.packed.read import FileTensor
    from afa.loading.tensor_files import StoredTensor

#: cosine similarity of duplicates; fine-tunes of one base reach 0.999
SAME = 0.9999
#: prefix of a denoiser's tensors in single files
_PREFIX = "model.diffusion_model."
#: largest value in half precision
_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Weights:
    """An expert's weight files.

    Attributes:
        name: the expert's name in messages.
        denoiser: the files with its denoiser.
        others: the files with its text encoders and its autoencoder.
        is_single: whether it is a single file, whose weights may be quantised.
    """

    name: str
    denoiser: Sequence[Path]
    others: Sequence[Path] = ()
    is_single: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in {*self.denoiser, *self.others})


def check_values(
    experts: Sequence[Weights], dtype: torch.dtype, progress: Callable[[int], object]
) -> Iterator[Finding]:
    """Read all weights once and yield findings about their values.

    Args:
        experts: all experts, each once.
        dtype: dtype that they will be used in.
        progress: called with the number of bytes after each tensor.
    """
    headers = [_headers(expert) for expert in experts]
    seen: set[Path] = set()
    for expert in experts:
        for file in expert.others:
            if file not in seen and file not in expert.denoiser:
                seen.add(file)
                for name, tensor in read_header(file).items():
                    yield from _check_tensor(expert.name, name, tensor, tensor.read(), dtype)
                    progress(tensor.num_bytes)
    products: dict[tuple[int, int], float] = defaultdict(float)
    for name in dict.fromkeys(name for header in headers for name in header):
        values: dict[int, torch.Tensor] = {}
        for number, (expert, header) in enumerate(zip(experts, headers, strict=True)):
            if name in header:
                value = header[name].read()
                yield from _check_tensor(expert.name, name, header[name], value, dtype)
                progress(header[name].num_bytes)
                if value.is_floating_point() and _is_of_denoiser(name):
                    values[number] = value.float().flatten()
        for a, b in itertools.combinations_with_replacement(values, 2):
            if values[a].shape == values[b].shape:
                products[a, b] += float(values[a] @ values[b])
    yield from _duplicates(experts, products)


def _headers(expert: Weights) -> Mapping[str, StoredTensor | FileTensor]:
    if expert.is_single:
        return file_tensors(expert.denoiser[0])
    return {name: tensor for file in expert.denoiser for name, tensor in read_header(file).items()}


def _is_of_denoiser(name: str) -> bool:
    """Whether the tensor belongs to the denoiser; text encoders are often equal."""
    return name.startswith(_PREFIX) or not name.startswith(
        ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")
    )


def _check_tensor(
    expert: str,
    name: str,
    tensor: StoredTensor | FileTensor,
    value: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[Finding]:
    if not value.is_floating_point() or value.numel() == 0 or name.endswith("attn_mask"):
        return
    if not is_finite(value):
        yield Finding(
            "AFA-CHECK-007",
            "error",
            "weights",
            f"'{name}' of '{expert}' ({tensor.file.name}) has non-finite values (NaN or infinity).",
            "All pictures would be black.",
            "Download the expert again, or remove it from the recipe.",
        )
    elif dtype == torch.float16 and value.dtype != torch.float16:
        largest = float(value.abs().max().float())
        if largest > _HALF:
            yield Finding(
                "AFA-CHECK-008",
                "error",
                "weights",
                f"'{name}' of '{expert}' has a value of {largest:.4g}, above float16's maximum of "
                f"{_HALF:.0f}.",
                "It would overflow to infinity, and all pictures would be black.",
                "Use bfloat16.",
            )


def _duplicates(
    experts: Sequence[Weights], products: Mapping[tuple[int, int], float]
) -> Iterator[Finding]:
    for a, b in itertools.combinations(range(len(experts)), 2):
        size = math.sqrt(products.get((a, a), 0) * products.get((b, b), 0))
        cosine = products.get((a, b), 0) / size if size and math.isfinite(size) else 0
        if cosine > SAME:
            yield Finding(
                "AFA-CHECK-009",
                "warning",
                "duplicates",
                f"The weights of '{experts[b].name}' and '{experts[a].name}' have a cosine "
                f"similarity of {cosine:.6f}.",
                "They are duplicates: one of them wastes time and memory.",
                "Remove one of them.",
            )
