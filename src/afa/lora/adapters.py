"""LoRA adapters of PEFT inside a model: added, trained with it, and merged into its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from afa.denoisers.sites import families_of_class


def add_adapters(model: Any, rank: int, name: str, *, is_text: bool) -> None:
    """Add adapters to all linear layers and convolutions inside the blocks of a model.

    Args:
        model: a denoiser or a text encoder, which is changed.
        rank: of the adapters; their alpha is the same.
        name: of the adapters, which is a part of their parameters' names.
        is_text: whether it is a text encoder.
    """
    from peft import LoraConfig, inject_adapter_in_model

    repeated = {name for each in families_of_class(type(model)) for name in each.repeated_blocks}
    blocks = [f"{name}." for name, m in model.named_modules() if type(m).__name__ in repeated]
    targets = [
        layer
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (_is_inside(layer, is_text=is_text) or layer.startswith(tuple(blocks)))
    ]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"
    )
    inject_adapter_in_model(config, model, adapter_name=name)


def _is_inside(name: str, *, is_text: bool) -> bool:
    """Whether a layer is inside a repeated block, not at a model's input or output."""
    return ".layers." in f".{name}" if is_text else "blocks." in name or "mid_block." in name


def merge_adapters(model: nn.Module) -> None:
    """Add the change of all adapters to the weights, and remove the adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
