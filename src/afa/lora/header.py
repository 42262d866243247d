"""What a LoRA's file says before its tensors are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA's file says before its tensors are read.

    Attributes:
        path: of the safetensors file.
        header: `dtype` and `shape` of every tensor, by name.
        metadata: of the header.
        adapter: PEFT's configuration for all tensors, from the `adapter_config.json` beside the
            file; None where the file is not in PEFT's own layout.
        adapters: PEFT's configuration by part, as diffusers keeps it in the metadata.
    """

    path: Path
    header: Mapping[str, Any]
    metadata: Mapping[str, str]
    adapter: Mapping[str, Any] | None
    adapters: Mapping[str, Mapping[str, Any]]

    @property
    def meant_for(self) -> str:
        """What the trainer says of the base, as the end of a sentence; empty if it says nothing."""
        keys = ("modelspec.architecture", "ss_base_model_version")
        said = next((self.metadata[key] for key in keys if self.metadata.get(key)), "")
        return f" Its metadata says that it is for {said[:60]}." if said else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.header[name]["shape"])
