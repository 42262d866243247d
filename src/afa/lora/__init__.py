"""LoRAs as arithmetic: which tensors change which layers of a model, and by how much.

Everything here is told from names, shapes and configurations; `afa.loading.lora` reads the files.
"""
