"""A look into the experts' weights: non-finite values, and experts that are nearly the same.

One tensor of each expert is in memory at a time.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.loading.finding import Finding
from afa.merging.method import is_finite
from afa.merging.streams import read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.merging.streams import StoredTensor

#: above it two experts are the same for any purpose; fine-tunes of one base reach 0.999
SAME = 0.9999
#: of single files' tensors: how those of a denoiser start
_PREFIX = "model.diffusion_model."
#: a closed interval of what half precision holds
_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Weights:
    """An expert's files.

    Attributes:
        name: of the expert, as messages call it.
        denoiser: the files with its denoiser.
        others: with its text encoders and its autoencoder.
    """

    name: str
    denoiser: Sequence[Path]
    others: Sequence[Path] = ()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in {*self.denoiser, *self.others})


def look_into(
    experts: Sequence[Weights], dtype: torch.dtype, progress: Callable[[int], object]
) -> Iterator[Finding]:
    """Read all weights once.

    Args:
        experts: all of them, each once.
        dtype: that they will be used in.
        progress: told the number of bytes after each tensor.
    """
    headers = [_headers(expert.denoiser) for expert in experts]
    seen: set[Path] = set()
    for expert in experts:
        for file in expert.others:
            if file not in seen and file not in expert.denoiser:
                seen.add(file)
                for name, tensor in read_header(file).items():
                    yield from _numbers(expert.name, name, tensor, tensor.read(), dtype)
                    progress(tensor.num_bytes)
    products: dict[tuple[int, int], float] = defaultdict(float)
    for name in dict.fromkeys(name for header in headers for name in header):
        values: dict[int, torch.Tensor] = {}
        for number, (expert, header) in enumerate(zip(experts, headers, strict=True)):
            if name in header:
                value = header[name].read()
                yield from _numbers(expert.name, name, header[name], value, dtype)
                progress(header[name].num_bytes)
                if value.is_floating_point() and _is_of_denoiser(name):
                    values[number] = value.float().flatten()
        for a, b in itertools.combinations_with_replacement(values, 2):
            if values[a].shape == values[b].shape:
                products[a, b] += float(values[a] @ values[b])
    yield from _alike(experts, products)


def _headers(files: Sequence[Path]) -> Mapping[str, StoredTensor]:
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def _is_of_denoiser(name: str) -> bool:
    """In a single file the text encoders are often the very same, which says nothing."""
    return name.startswith(_PREFIX) or not name.startswith(
        ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")
    )


def _numbers(
    expert: str, name: str, tensor: StoredTensor, value: torch.Tensor, dtype: torch.dtype
) -> Iterator[Finding]:
    if not value.is_floating_point() or value.numel() == 0 or name.endswith("attn_mask"):
        return
    if not is_finite(value):
        yield Finding(
            "AFA-CHECK-007",
            "error",
            "weights",
            f"Weights must be finite numbers; '{name}' of '{expert}' ({tensor.file.name}) has nan "
            "or infinity.",
            "All pictures would be black.",
            "Download it again, or leave this expert out.",
        )
    elif dtype == torch.float16 and value.dtype != torch.float16:
        largest = float(value.abs().max().float())
        if largest > _HALF:
            yield Finding(
                "AFA-CHECK-008",
                "error",
                "weights",
                f"In float16 no number may be above {_HALF:.0f}; '{name}' of '{expert}' has "
                f"{largest:.4g}.",
                "It would become infinity, and all pictures black.",
                "Use bfloat16.",
            )


def _alike(
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
                f"Experts should differ; the weights of '{experts[b].name}' and "
                f"'{experts[a].name}' have a cosine similarity of {cosine:.6f}.",
                "They draw the same: one of them takes its time and memory for nothing.",
                "Leave one out.",
            )
