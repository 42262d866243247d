"""Files with quantised weights, in the layouts of ComfyUI and of GGUF."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Layout = Literal["scale_weight", "comfy_quant", "metadata", "plain"]


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is quantised in published files: the weight of a linear layer."""
    return name.endswith(".weight") and tensor.ndim == 2


def scaled(
    tensors: dict[str, Tensor],
    layout: Layout,
    prefix: str = "model.diffusion_model.",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """Quantise the matrices with this prefix to float8; without scales, all tensors.

    Returns: the tensors of the file, its metadata, and all tensors after dequantisation.
    """
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    exact = dict(tensors)
    most = torch.finfo(dtype).max
    name_of = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or not (layout == "plain" or is_matrix(name, tensor)):
            found[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = torch.ones(()) if layout == "plain" else tensor.abs().max().float() / most
        found[name] = (tensor.float() / scale).clamp(-most, most).to(dtype)
        exact[name] = found[name].float() * scale
        if layout == "scale_weight":
            found[f"{layer}.scale_weight"] = scale.reshape(1)
            found[f"{layer}.scale_input"] = torch.full((1,), 0.5)
        elif layout != "plain":
            found[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": name_of}
    metadata = {}
    if layout == "scale_weight":
        found[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=dtype)
    elif layout == "metadata":
        content = {"format_version": "1.0", "layers": layers}
        metadata["_quantization_metadata"] = json.dumps(content)
    elif layout == "comfy_quant":
        for layer, described in layers.items():
            text = json.dumps(described).encode()
            found[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return found, metadata, exact


def write_scaled(
    tensors: dict[str, Tensor], file: Path, layout: Layout, prefix: str = "model.diffusion_model."
) -> dict[str, Tensor]:
    """Write such a file; return all tensors after dequantisation."""
    found, metadata, exact = scaled(tensors, layout, prefix)
    save_file({name: t.clone().contiguous() for name, t in found.items()}, file, metadata)
    return exact
