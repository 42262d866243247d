"""LoRA arithmetic: which tensors change which layers of a model, and by how much.

This package uses names, shapes and configurations; `afa.loading.lora` reads the files.
"""
