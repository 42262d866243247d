"""Merge the tensors of one LoRA layer into its weights, in float32.

    W + scale * factor * up @ down        LoRA, https://arxiv.org/abs/2106.09685
    m * (W + D) / |W + D|                 DoRA, https://arxiv.org/abs/2402.09353, norm by row

`afa.lora.lycoris` has the formulas of LyCORIS' other layouts.

Convolutions are products of their flattened kernels. With a core between the factors (LyCORIS,
https://arxiv.org/abs/2309.14859, CP decomposition) a convolution is a sequence of 1 x 1, k x k and
1 x 1 convolutions. `peft` and `diffusers` compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.lora.lycoris import change_of, decomposed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from afa.denoisers.original_names import Rows
    from afa.lora.names import Role


def merged(
    tensors: Mapping[Role, Tensor],
    rows: tuple[Rows, ...],
    parameters: Mapping[str, Tensor],
    factor: float,
    scale: float,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new parameters of the layers that one entry of a file changes.

    Args:
        tensors: of the entry in float32, by role.
        rows: the layers, whose rows are concatenated in the tensors.
        parameters: of the complete part, by name.
        factor: alpha / rank.

    Returns: names and new values in float32.
    """
    weights = [parameters[f"{each.layer}.weight"] for each in rows]
    sizes = [len(weight) for weight in weights]
    split = {role: _split(t, sizes, rows) for role, t in _by_rows(tensors, factor).items()}
    for n, (each, weight) in enumerate(zip(rows, weights, strict=True)):
        of = {role: parts[n] for role, parts in split.items()}
        name = f"{each.layer}.weight"
        if "weight" in of:
            yield name, of["weight"].reshape(weight.shape)
        elif "diff" in of:
            new = weight.float() + scale * of["diff"].reshape(weight.shape)
            if "magnitude" in of:
                norm = torch.linalg.vector_norm(new, dim=tuple(range(1, new.ndim)), keepdim=True)
                new = new * (of["magnitude"].reshape(norm.shape) / norm)
            elif "dora_scale" in tensors:
                new = decomposed(new, of.get("dora_scale", tensors["dora_scale"]))
            yield name, new
        name = f"{each.layer}.bias"
        if "bias" in of:
            yield name, of["bias"]
        elif "diff_b" in of:
            yield name, parameters[name].float() + scale * of["diff_b"]


def _by_rows(tensors: Mapping[Role, Tensor], factor: float) -> dict[Role, Tensor]:
    """Return all added or replaced values, whose first dimension is the weight's rows."""
    found: dict[Role, Tensor] = {
        role: tensors[role] for role in ("weight", "bias", "diff", "diff_b") if role in tensors
    }
    if "magnitude" in tensors:
        found["magnitude"] = tensors["magnitude"].flatten()
    if "mid" in tensors:
        up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
        found["diff"] = torch.einsum("or,rs...,si->oi...", up, tensors["mid"], down) * factor
    elif "up" in tensors:
        found["diff"] = (tensors["up"].flatten(1) @ tensors["down"].flatten(1)) * factor
    elif (change := change_of(tensors)) is not None:
        found["diff"] = change * factor
    if "dora_scale" in tensors and len(tensors["dora_scale"]) > 1:  # by output
        found["dora_scale"] = tensors["dora_scale"]
    if "up_bias" in tensors:
        found["diff_b"] = tensors["up_bias"] * factor
    return found


def _split(tensor: Tensor, sizes: list[int], rows: tuple[Rows, ...]) -> list[Tensor]:
    """Split a tensor into the rows of each layer."""
    parts = tensor.split(sizes)
    return [
        torch.cat(part.chunk(2)[::-1]) if each.is_swapped else part
        for part, each in zip(parts, rows, strict=True)
    ]
