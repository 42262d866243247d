"""LoRAs as experts: every tensor of a file is applied, known to be harmless, or refused by name."""

from afa.lora.expert import (
    AnyExpert,
    LoraExpert,
    base_of,
    check_lora,
    lora_expert,
    shared_copy,
)
from afa.lora.file import hash_lora

__all__ = [
    "AnyExpert",
    "LoraExpert",
    "base_of",
    "check_lora",
    "hash_lora",
    "lora_expert",
    "shared_copy",
]
