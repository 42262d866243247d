"""LoRAs as experts: every tensor of a file is applied, known to be harmless, or refused by name."""

from afa.lora.expert import (
    AnyExpert,
    Asked,
    LoraExpert,
    as_expert,
    base_of,
    check_lora,
    description_of,
    lora_expert,
    moved_expert,
    refer_description,
    shared_copy,
)
from afa.lora.file import hash_lora

__all__ = [
    "AnyExpert",
    "Asked",
    "LoraExpert",
    "as_expert",
    "base_of",
    "check_lora",
    "description_of",
    "hash_lora",
    "lora_expert",
    "moved_expert",
    "refer_description",
    "shared_copy",
]
