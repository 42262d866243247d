"""The header of a LoRA file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class LoraFile:
    """Header and configurations of a LoRA file, without its tensors.

    Attributes:
        path: of the safetensors file.
        header: `dtype` and `shape` of every tensor, by name.
        metadata: of the header.
        adapter: PEFT's configuration for all tensors, from the `adapter_config.json` beside the
            file; None if the file is not in PEFT's own layout.
        adapters: PEFT's configuration by part, from diffusers' metadata.
    """

    path: Path
    header: Mapping[str, Any]
    metadata: Mapping[str, str]
    adapter: Mapping[str, Any] | None
    adapters: Mapping[str, Mapping[str, Any]]

    @property
    def meant_for(self) -> str:
        """A sentence about the base in the metadata, for messages; empty without an entry."""
        keys = ("modelspec.architecture", "ss_base_model_version")
        base = next((self.metadata[key] for key in keys if self.metadata.get(key)), "")
        return f" Its metadata says that it is for {base[:60]}." if base else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.header[name]["shape"])
