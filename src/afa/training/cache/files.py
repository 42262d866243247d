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
from afa.weights import loading

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2  # a change of what shards hold makes all of them anew
SHARD = 256  # samples, or captions
BATCH = 8  # that are encoded at once
META = "afa"


@dataclass(frozen=True)
class CacheProgress:
    """How far a pass over the data is; `total` is None where only its end will tell."""

    stage: str
    done: int
    total: int | None
    notes: tuple[str, ...] = ()


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/afa/encoded`, by default in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "afa" / "encoded"


def write_shard(place: Path, tensors: dict[str, Tensor], header: Any) -> None:
    """Write a shard, whole or not at all."""
    write_atomic(place, save(tensors, metadata={META: json.dumps(header)}))


def shard_name(number: int) -> str:
    """The file of a numbered shard."""
    return f"{number:06d}.safetensors"


def digest(content: Any) -> str:
    """A folder's or file's name for some JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


@lru_cache(maxsize=256)
def _opened(place: Path) -> Any:
    return safe_open(place, framework="pt")


def _reading(place: Path) -> Any:
    return loading(f"The cache's '{place}' must be complete", "Delete it to make it again.")


def read_header(place: Path) -> Any:
    """What a shard says of itself."""
    with _reading(place), safe_open(place, framework="pt") as file:
        return json.loads(file.metadata()[META])


def read_row(place: Path, name: str, row: int) -> Tensor:
    """One row of one of a shard's tensors."""
    with _reading(place):
        return _opened(place).get_slice(name)[row]


def read_rows(place: Path, row: int) -> dict[str, Tensor]:
    """One row of each of a shard's tensors, by name."""
    with _reading(place):
        file = _opened(place)
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118
