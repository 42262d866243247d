"""The header of a LoRA file, and the factor of its low-rank products: alpha / rank.

Kohya's scripts store alpha as a tensor of each layer. PEFT stores it in its configuration, by
patterns of layer names, and optionally divides by the square root of the rank instead (rsLoRA,
https://arxiv.org/abs/2312.03732). In files of diffusers without either, alpha is the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.lora.names import RAW_PEFT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_DEFAULT = 8  # of rank and alpha, in `peft.LoraConfig`


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

    def config_for(self, layer: str) -> Mapping[str, Any] | None:
        """Return PEFT's configuration for a layer of the file; None without one."""
        if layer.startswith(RAW_PEFT):
            return self.adapter
        return self.adapters.get(layer.partition(".")[0])

    def check_scaling(self, layer: str, rank: int, *, has_alpha: bool) -> None:
        """Check that a layer has one scale, and the rank of the configuration.

        Raises:
            AfaError: if not; names the layer.
        """
        config = self.config_for(layer)
        if config is None:
            return
        if has_alpha:
            raise AfaError(
                "AFA-LORA-014",
                f"The LoRA '{self.path}' has two scales for '{layer}': an alpha tensor and PEFT's "
                "configuration. Save it again without one of them.",
            )
        configured = _setting(config, "r", layer)
        if configured != rank:
            raise AfaError(
                "AFA-LORA-015",
                f"'{layer}' of the LoRA '{self.path}' has rank {rank}, but PEFT's configuration "
                f"says {configured}; they must be equal. Download file and configuration again.",
            )

    def factor(self, layer: str, rank: int, alpha: float | None) -> float:
        """Return the factor of a layer's product; `alpha` is the value of its alpha tensor."""
        if alpha is not None:
            return alpha / rank
        config = self.config_for(layer)
        if config is None:
            return 1.0
        configured = _setting(config, "lora_alpha", layer)
        return configured / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(config: Mapping[str, Any], key: str, layer: str) -> float:
    """Return PEFT's setting for a layer, by patterns matched from the end of its name."""
    from peft.utils.other import get_pattern_key

    pattern = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
    name = layer.removeprefix(RAW_PEFT)
    # patterns that begin with ^ match PEFT's name of the layer, without the part
    bare = name.partition(".")[2] if layer == name else name
    found: float = pattern.get(get_pattern_key(list(pattern), bare), config.get(key, _DEFAULT))
    return found
