"""What is kept of a result: a hash of its every bit, and a few numbers to compare by.

Hashes are compared on a machine like the one that the record was written on. Another processor
adds in another order, so there the numbers are compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

#: what differs from run to run: times, places, software
_VOLATILE = re.compile(r"second|time|memory|peak|machine|software|commit|version|date|created")
_HOW_OFTEN = re.compile(r"[0-9.]+ (s|seconds|MB|GB|ms)\b")


@dataclass(frozen=True)
class Digest:
    """One result.

    Attributes:
        sha256: of every bit of it, the first 16 digits.
        numbers: what is compared where bits may differ.
        tolerance: absolute, of these numbers.
    """

    sha256: str
    numbers: tuple[float, ...]
    tolerance: float

    def as_json(self) -> list[Any]:
        return [self.sha256, list(self.numbers), self.tolerance]

    def equals(self, other: Digest, *, to_the_bit: bool) -> bool:
        """Whether it is the same result, on the same or on another processor."""
        if to_the_bit:
            return self.sha256 == other.sha256
        return len(self.numbers) == len(other.numbers) and bool(
            np.allclose(self.numbers, other.numbers, rtol=1e-3, atol=other.tolerance)
        )


def machine() -> str:
    """What the last bits depend on: the processor and the library's version."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([*sorted(names), capability, f"torch {torch.__version__}"])


def of_pictures(files: Sequence[Path]) -> Digest:
    """Pictures: their pixels, and the mean colours of sixteen parts of each, from 0 to 255."""
    content, means = b"", []
    for file in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        content += pixels.tobytes()
        rows = np.array_split(pixels.astype(np.float64), 4)
        means += [part.mean((0, 1)) for row in rows for part in np.array_split(row, 4, axis=1)]
    return _digest(content, np.concatenate(means).round(1).tolist(), tolerance=4)


def of_tensor(tensor: Tensor) -> Digest:
    """A tensor: its bytes; shape, mean and mean of the absolute values."""
    flat = tensor.detach().contiguous()
    values = flat.double()
    numbers = [*map(float, flat.shape), float(values.mean()), float(values.abs().mean())]
    content = flat.view(torch.uint8).numpy().tobytes() if flat.ndim else str(flat).encode()
    return _digest(content + str(flat.dtype).encode(), numbers, tolerance=1e-4)


def of_tensors(file: Path) -> Digest:
    """A safetensors file: every tensor with its name; their number and the mean of the means."""
    tensors = sorted(load_file(file).items())
    each = {name: of_tensor(tensor) for name, tensor in tensors}
    means = [digest.numbers[-1] for digest in each.values()]
    hashes = "".join(f"{name} {digest.sha256}\n" for name, digest in each.items())
    return _digest(hashes.encode(), [len(means), float(np.mean(means))], tolerance=1e-4)


def of_numbers(values: Sequence[float]) -> Digest:
    """Numbers, such as losses, as they are printed to their last bit."""
    return _digest(json.dumps(list(values)).encode(), list(values), tolerance=1e-3)


def of_json(content: Any, root: Path, *, has_numbers: bool = True) -> Digest:
    """JSON without what differs from run to run: times, places, software.

    Args:
        content: as it was read.
        root: the folder whose name is replaced, as it is another in every run.
        has_numbers: whether its numbers are compared on another processor; hashes of files are not.
    """
    steady = _steady(content, root)
    numbers = [value for value in _leaves(steady) if isinstance(value, int | float)]
    text = json.dumps(steady, sort_keys=True)
    return _digest(text.encode(), list(map(float, numbers)) if has_numbers else [], tolerance=5e-2)


def of_text(file: Path, root: Path) -> Digest:
    """A text without the name of its folder; on another processor its lines are counted."""
    text = file.read_text(encoding="utf-8").replace(str(root), "ROOT")
    return _digest(text.encode(), [len(text.splitlines())], tolerance=0)


def _digest(content: bytes, numbers: Sequence[float], tolerance: float) -> Digest:
    rounded = tuple(float(f"{number:.6g}") for number in numbers)
    return Digest(hashlib.sha256(content).hexdigest()[:16], rounded, tolerance)


def _steady(content: Any, root: Path) -> Any:
    if isinstance(content, Mapping):
        kept = {key: each for key, each in content.items() if not _VOLATILE.search(str(key))}
        return {str(key): _steady(each, root) for key, each in kept.items()}
    if isinstance(content, list):
        return [_steady(each, root) for each in content]
    if isinstance(content, str):
        return _HOW_OFTEN.sub("SOME", content.replace(str(root), "ROOT"))
    return content


def _leaves(content: Any) -> list[Any]:
    if isinstance(content, Mapping):
        content = [content[key] for key in sorted(content)]
    if isinstance(content, list):
        return [leaf for each in content for leaf in _leaves(each)]
    return [content]
