"""LoRAs as experts: every tensor of a file is applied, known to have no effect, or refused."""

from afa.loading.lora.expert import check_lora, lora_expert, shared_copy
from afa.loading.lora.file import hash_lora

__all__ = ["check_lora", "hash_lora", "lora_expert", "shared_copy"]
