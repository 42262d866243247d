"""What a low-rank product is multiplied by: alpha / rank, wherever a file says it.

Kohya's scripts keep alpha as a tensor beside each layer; PEFT in its configuration, by patterns of
layers' names, and optionally over the root of the rank (rsLoRA, https://arxiv.org/abs/2312.03732);
files of diffusers without either have it equal to the rank.
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
    """PEFT's configuration for a layer as the file names it; None where there is none."""
    if layer.startswith(RAW_PEFT):
        return lora.adapter
    return lora.adapters.get(layer.partition(".")[0])


def check_scaling(lora: LoraFile, layer: str, rank: int, *, has_alpha: bool) -> None:
    """Refuse a scale that two places give, or a rank that contradicts the configuration.

    Raises:
        AfaError: names the layer.
    """
    config = config_for(lora, layer)
    if config is None:
        return
    if has_alpha:
        raise AfaError(
            "AFA-LORA-014",
            f"The LoRA '{lora.path}' has two scales for '{layer}': an alpha tensor and PEFT's "
            "configuration. One of them must be there. Save it again without the other.",
        )
    said = _setting(config, "r", layer)
    if said != rank:
        raise AfaError(
            "AFA-LORA-015",
            f"'{layer}' of the LoRA '{lora.path}' has rank {rank}; PEFT's configuration says "
            f"{said}. They must be equal. Download file and configuration again.",
        )


def factor(lora: LoraFile, layer: str, rank: int, alpha: float | None) -> float:
    """What the product of a layer's two factors is multiplied by.

    Args:
        lora: the file.
        layer: as the file names it.
        rank: of the product.
        alpha: of the layer's own alpha tensor.
    """
    if alpha is not None:
        return alpha / rank
    config = config_for(lora, layer)
    if config is None:
        return 1.0
    said = _setting(config, "lora_alpha", layer)
    return said / math.sqrt(rank) if config.get("use_rslora") else said / rank


def _setting(config: Mapping[str, Any], key: str, layer: str) -> float:
    """Of a layer, by the patterns that PEFT matches from the end of its name."""
    from peft.utils.other import get_pattern_key

    pattern = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
    name = layer.removeprefix(RAW_PEFT)
    # PEFT knows the layer without the part's name, which a pattern that begins with ^ sees
    bare = name.partition(".")[2] if layer == name else name
    found: float = pattern.get(get_pattern_key(list(pattern), bare), config.get(key, _DEFAULT))
    return found
