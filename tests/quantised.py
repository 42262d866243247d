"""Files with quantised weights, in the layouts of ComfyUI and of GGUF."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
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


# -- GGUF -------------------------------------------------------------------------------------

#: where the half-precision factors are in a block, for types that the package cannot quantise to
_FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_FACTORS |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}


def quantised_rows(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Quantise a matrix with gguf's own quantiser, or draw random blocks where it has none."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind not in _FACTORS:
        quantised: np.ndarray[Any, Any] = gguf.quants.quantize(values.astype(np.float32), number)
        return quantised
    elements, size = gguf.GGML_QUANT_SIZES[number]
    count = values.size // elements
    generator = np.random.default_rng(count)
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for place in _FACTORS[kind]:
        factors = generator.uniform(1e-5, 1e-4, (count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = factors.view(np.uint8)
    return blocks.reshape(len(values), -1)


def write_gguf(
    tensors: dict[str, Tensor],
    file: Path,
    architecture: str,
    kind: str,
    *,
    flatten: bool = False,
) -> dict[str, Tensor]:
    """Write a GGUF file; all weights that consist of blocks are quantised, others are float32.

    Args:
        flatten: also quantise weights whose rows are no blocks, as converters for U-Nets do.

    Returns: all tensors after dequantisation by the package.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture)
    number = gguf.GGMLQuantizationType[kind]
    elements, _ = gguf.GGML_QUANT_SIZES[number]
    exact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        if flatten and name.endswith(".weight") and values.size % 256 == 0 and values.ndim > 1:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            rows = values.reshape(-1, 256)
        elif is_matrix(name, tensor) and values.shape[1] % elements == 0:
            rows = values
        else:
            writer.add_tensor(name, values)
            exact[name] = tensor.float()
            continue
        quantised = quantised_rows(rows, kind)
        writer.add_tensor(name, quantised, raw_dtype=number)
        found = gguf.quants.dequantize(quantised, number)
        exact[name] = torch.from_numpy(found.astype(np.float32).reshape(values.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact
