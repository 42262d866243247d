"""The canonical form of U-Net configurations; see `afa.denoisers.architecture`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def canonical_unet_config(config: dict[str, Any]) -> None:
    """Expand numbers to one value per level, and set values that no block uses to None.

    Args:
        config: a configuration with diffusers' defaults and with tuples for lists; changed in
            place.
    """
    for key in ("down_block_types", "up_block_types"):
        config[key] = tuple(name.removeprefix("UNetRes") for name in config[key])
    down, up = config["down_block_types"], config["up_block_types"]
    levels = len(down)
    last = [False] * (levels - 1) + [config["mid_block_type"] is not None]
    # the levels with any attention, and those with cross attention to the text
    attends, reads = (
        [mark in a or mark in b or c for a, b, c in zip(down, reversed(up), last, strict=True)]
        for mark in ("Attn", "CrossAttn")
    )
    layers = _per_level(config["layers_per_block"], levels)
    config["layers_per_block"] = layers
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    config["num_attention_heads"] = None
    config["attention_head_dim"] = _masked(_per_level(heads, levels), attends)
    if config["encoder_hid_dim"] is None:
        widths = _per_level(config["cross_attention_dim"], levels)
        config["cross_attention_dim"] = _masked(widths, reads)
    only = config["only_cross_attention"]
    middle = config["mid_block_only_cross_attention"]
    if middle is None:
        middle = only if isinstance(only, bool) else False
    is_simple = config["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn"
    config["mid_block_only_cross_attention"] = middle if is_simple else None
    config["only_cross_attention"] = _masked(_per_level(only, levels), reads)
    _transformer_layers(config, layers)
    if config["time_embedding_dim"] is None:
        times = {"positional": 4, "fourier": 2}[config["time_embedding_type"]]
        config["time_embedding_dim"] = times * config["block_out_channels"][0]
    added, labels = config["addition_embed_type"], config["class_embed_type"]
    unused = {
        "addition_embed_type_num_heads": added != "text",
        "addition_time_embed_dim": added != "text_time",
        "projection_class_embeddings_input_dim": added != "text_time"
        and labels not in ("projection", "simple_projection"),
    }
    config.update({key: None for key, is_unused in unused.items() if is_unused})


def _transformer_layers(config: dict[str, Any], layers: Sequence[int]) -> None:
    """Expand the numbers of transformer layers: down blocks, mid block and up blocks."""
    down, up = config["down_block_types"], config["up_block_types"]
    asked = _per_level(config["transformer_layers_per_block"], len(down))
    backwards = config["reverse_transformer_layers_per_block"]
    backwards = asked[::-1] if backwards is None else _per_level(backwards, len(up))
    numbers = zip(backwards, up, reversed(layers), strict=True)
    config["reverse_transformer_layers_per_block"] = tuple(
        _per_level(n, count + 1) if "CrossAttn" in name else None for n, name, count in numbers
    )
    numbers = zip(asked, down, layers, strict=True)
    in_levels = [
        _per_level(n, count) if "CrossAttn" in name else None for n, name, count in numbers
    ]
    has_middle = "CrossAttn" in (config["mid_block_type"] or "")
    middle = asked[-1][0] if isinstance(asked[-1], tuple) else asked[-1]
    config["transformer_layers_per_block"] = (*in_levels, middle if has_middle else None)


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


def _masked(values: Sequence[Any], used: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(v if is_used else None for v, is_used in zip(values, used, strict=True))
