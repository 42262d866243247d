"""The files of the cache: shards of safetensors with a JSON header."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save

from afa.files import write_atomic
from afa.machine.damaged import Unreadable, loading, metadata_json

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 3  # increase it when the content of shards, or the reading of pictures, changes
SHARD = 256  # samples or captions per shard
BATCH = 8  # samples or captions encoded at once
META = "afa"


@dataclass(frozen=True)
class CacheProgress:
    """Progress of a pass over the data; `total` is None if the size of the data is unknown."""

    stage: str
    done: int
    total: int | None
    notes: tuple[str, ...] = ()


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/afa/encoded`, by default in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "afa" / "encoded"


def write_shard(place: Path, tensors: dict[str, Tensor], header: Any) -> None:
    """Write a shard atomically."""
    write_atomic(place, save(tensors, metadata={META: json.dumps(header)}))


def shard_name(number: int) -> str:
    """The file name of a numbered shard."""
    return f"{number:06d}.safetensors"


def digest(content: Any) -> str:
    """A hash of JSON content, used as the name of a folder or file."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _reading(place: Path) -> Any:
    return loading(f"The cache's '{place}' must be complete", "Delete it, and run again.")


def read_header(place: Path) -> Any:
    """The JSON header of a shard."""
    with _reading(place), safe_open(place, framework="pt") as file:
        return metadata_json(file, META)


class Shards:
    """Reads rows of shards, and keeps the 256 most recent shards open."""

    def __init__(self) -> None:
        self._opened = lru_cache(maxsize=256)(_mapped)

    def row(self, place: Path, row: int, group: str = "") -> dict[str, Tensor]:
        """One row of each tensor of a shard, by name; of the tensors of a group, see `grouped`."""
        with _reading(place):
            tensors = {
                name.removesuffix(group): tensor
                for name, tensor in self._opened(place).items()
                if name.endswith(group)
            }
            for name, tensor in tensors.items():
                if tensor.shape[:1] <= (row,):
                    raise Unreadable(f"'{name}' of shape {tuple(tensor.shape)} has no row {row}")
            return {name: tensor[row] for name, tensor in tensors.items()}


def grouped(name: str, size: tuple[int, int]) -> str:
    """The name of a tensor with the rows of one size of pictures, in a shard of several."""
    return f"{name} {size[0]}x{size[1]}"


def _mapped(place: Path) -> dict[str, Tensor]:
    """Memory-map a shard's tensors, each once, since every `get_tensor` leaks two objects."""
    with safe_open(place, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
