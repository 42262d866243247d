"""Estimate the memory that safetensors leaks: numbers that it creates and never frees.

Whenever safetensors reads a tensor for torch, it slices the file's storage, and the two ends of the
slice, Python numbers of 32 bytes, are never freed (0.4.5 to 0.8.0; its bindings make the slice). A
program cannot avoid this leak, and a soak test reads thousands of tensors a minute. So the reads
are counted, and the leak of one read is measured beforehand. For a release without the leak,
nothing is subtracted.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

#: size in bytes of a block that holds such a number
BLOCK = 32
_TENSORS, _TIMES = 100, 50

_reads = itertools.count()  # atomic, so that all threads can count
_own_looks = itertools.count()
_lost_by_one = 0.0


def lost_blocks() -> int:
    """Return the number of Python memory blocks that the counted reads have leaked."""
    done = next(_reads) - next(_own_looks)
    return round(_lost_by_one * done)


def count_reads() -> None:
    """Start counting reads; call this before other modules that read weights are imported."""
    global _lost_by_one

    import safetensors
    import safetensors.torch

    opened = safetensors.safe_open
    if not isinstance(opened, type):
        raise RuntimeError("reads are counted already")
    _lost_by_one = _measure(opened)

    def safe_open(*args: Any, **kwargs: Any) -> _Opened:
        return _Opened(opened(*args, **kwargs))

    library: Any = safetensors
    library.safe_open = library.torch.safe_open = safe_open


def _measure(opened: Callable[..., Any]) -> float:
    """Measure how many blocks one read leaks, to a hundredth."""
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.safetensors"
        save_file({f"tensor {n}": torch.zeros(300) for n in range(_TENSORS)}, file)

        def read() -> None:
            with opened(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensors.get_tensor(name)

        read()
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(_TIMES):
            read()
        gc.collect()
        return round((sys.getallocatedblocks() - before) / (_TIMES * _TENSORS), 2)


class _Opened:
    """An open file of weights that counts its reads."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Opened:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Any:
        next(_reads)
        return self._file.get_tensor(name)

    def get_tensors(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._file.get_tensors(*args, **kwargs)
        for _ in tensors:
            next(_reads)
        return tensors

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name))


class _Slice:
    """A part of a file of weights that counts its reads."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __getitem__(self, index: Any) -> Any:
        next(_reads)
        return self._part[index]
