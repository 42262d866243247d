"""The factor of a low-rank product: alpha / rank.

Kohya's scripts store alpha as a tensor of each layer. PEFT stores it in its configuration, by
patterns of layer names, and optionally divides by the square root of the rank instead (rsLoRA,
https://arxiv.org/abs/2312.03732). In files of diffusers without either, alpha is the rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.lora.names import RAW_PEFT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.lora.header import LoraFile

_DEFAULT = 8  # of rank and alpha, in `peft.LoraConfig`


def config_for(lora: LoraFile, layer: str) -> Mapping[str, Any] | None:
    """Return PEFT's configuration for a layer of the file; None without one."""
    if layer.startswith(RAW_PEFT):
        return lora.adapter
    return lora.adapters.get(layer.partition(".")[0])


def check_scaling(lora: LoraFile, layer: str, rank: int, *, has_alpha: bool) -> None:
    """Check that there is one scale, and that the rank agrees with the configuration.

    Raises:
        AfaError: if not; names the layer.
    """
    config = config_for(lora, layer)
    if config is None:
        return
    if has_alpha:
        raise AfaError(
            "AFA-LORA-014",
            f"The LoRA '{lora.path}' has two scales for '{layer}': an alpha tensor and PEFT's "
            "configuration. Save it again without one of them.",
        )
    configured = _setting(config, "r", layer)
    if configured != rank:
        raise AfaError(
            "AFA-LORA-015",
            f"'{layer}' of the LoRA '{lora.path}' has rank {rank}, but PEFT's configuration says "
            f"{configured}; they must be equal. Download file and configuration again.",
        )


def factor(lora: LoraFile, layer: str, rank: int, alpha: float | None) -> float:
    """Return the factor of a layer's low-rank product.

    Args:
        lora: the file.
        layer: as named in the file.
        rank: of the product.
        alpha: value of the layer's alpha tensor, if there is one.
    """
    if alpha is not None:
        return alpha / rank
    config = config_for(lora, layer)
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
