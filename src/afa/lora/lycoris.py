"""Changes of weights in LyCORIS' layouts: LoHa, LoKr, and DoRA with `dora_scale`.

    LoHa    (A1 B1) * (A2 B2), the product by elements
    LoKr    kron(C, D), where each factor may itself be a low-rank product
    DoRA    m * V / |V|, where V is the changed weight, by row or by column of its input

Sources: FedPara, https://arxiv.org/abs/2108.06098 (LoHa); LyCORIS, https://arxiv.org/abs/2309.14859,
and its docs/Algo-Details.md; DoRA, https://arxiv.org/abs/2402.09353. For convolutions there may be
cores (Tucker decomposition), `hada_t1` and `hada_t2` or `lokr_t2`, whose factors are transposed.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from afa.lora.names import Role

    Shape = tuple[int, ...]

HADA: tuple[Role, ...] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
HADA_CORES: tuple[Role, ...] = ("hada_t1", "hada_t2")
LOKR: tuple[Role, ...] = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
#: roles that change a weight
CHANGING: frozenset[Role] = frozenset((*HADA, *HADA_CORES, *LOKR))


def lacking(roles: Collection[Role]) -> Role | None:
    """Return the first tensor that a LoHa or LoKr of these roles lacks; None if it is complete."""
    needed: list[Role] = []
    if set(roles) & {*HADA, *HADA_CORES}:
        needed += HADA
        if set(roles) & set(HADA_CORES):
            needed += HADA_CORES
    if set(roles) & set(LOKR):
        if "lokr_w1" not in roles:
            needed += ("lokr_w1_a", "lokr_w1_b")
        if "lokr_w2" not in roles or "lokr_t2" in roles:
            needed += ("lokr_w2_a", "lokr_w2_b")
    return next((role for role in needed if role not in roles), None)


def rank_of(shapes: Mapping[Role, Shape]) -> int | None:
    """Return the rank by which alpha is divided; None if alpha has no effect.

    A LoKr of two complete factors has no rank.
    """
    for role in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in shapes:
            return shapes[role][0] if shapes[role] else 0
    return None


def expected_shapes(held: Mapping[Role, Shape], whole: Shape) -> dict[Role, tuple[Shape, ...]]:
    """Return the possible shapes of the tensors of a complete LoHa or LoKr.

    Args:
        held: the shapes in the file.
        whole: the shape of the weight, [out, in] or [out, in, height, width].
    """
    rank, size = rank_of(held) or 0, prod(whole[2:])
    found: dict[Role, tuple[Shape, ...]] = {}
    flat_rows = (rank, whole[1] * size)
    if "hada_t1" in held:
        for one in ("1", "2"):
            found[_role(f"hada_w{one}_a")] = ((rank, whole[0]),)
            found[_role(f"hada_w{one}_b")] = ((rank, whole[1]),)
            found[_role(f"hada_t{one}")] = ((rank, rank, *whole[2:]),)
    elif "hada_w1_a" in held:
        for one in ("1", "2"):
            found[_role(f"hada_w{one}_a")] = ((whole[0], rank),)
            found[_role(f"hada_w{one}_b")] = (flat_rows, (rank, *whole[1:]))
    if set(held) & set(LOKR):
        sides = held.get("lokr_w1")
        if sides is None:
            sides = (*held["lokr_w1_a"][:1], *held["lokr_w1_b"][1:2])
        rows, columns = sides if len(sides) == 2 else (0, 0)  # 0 fits no shape
        first = (rows, columns)
        rest = (whole[0] // max(rows, 1), whole[1] // max(columns, 1))
        if (rest[0] * rows, rest[1] * columns) != whole[:2]:
            rest = (0, 0)
        found["lokr_w1"] = (first,)
        found["lokr_w1_a"], found["lokr_w1_b"] = ((rows, rank),), ((rank, columns),)
        found["lokr_w2"] = ((*rest, *whole[2:]), rest if size == 1 else (*rest, *whole[2:]))
        if "lokr_t2" in held:
            found["lokr_w2_a"], found["lokr_w2_b"] = ((rank, rest[0]),), ((rank, rest[1]),)
            found["lokr_t2"] = ((rank, rank, *whole[2:]),)
        else:
            found["lokr_w2_a"] = ((rest[0], rank),)
            found["lokr_w2_b"] = ((rank, rest[1] * size), (rank, rest[1], *whole[2:]))
    if "dora_scale" in held:
        ones = (1,) * len(whole[2:])
        found["dora_scale"] = ((whole[0], 1, *ones), (1, whole[1], *ones))
    return found


def _role(name: str) -> Role:
    return name  # type: ignore[return-value]


def change_of(tensors: Mapping[Role, Tensor]) -> Tensor | None:
    """Compute the change of a weight, without alpha; None if it is neither LoHa nor LoKr.

    Args:
        tensors: complete, in float32, by role.

    Returns: [out, ...] with the elements of the weight in its order.
    """
    if "hada_w1_a" in tensors:
        first, second = (
            _factor(tensors, f"hada_w{one}_a", f"hada_w{one}_b", f"hada_t{one}") for one in "12"
        )
        return first * second
    if not CHANGING & tensors.keys():
        return None
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else _factor(tensors, *_LOKR_1)
    second = tensors["lokr_w2"] if "lokr_w2" in tensors else _factor(tensors, *_LOKR_2)
    rows, columns = first.shape
    # [rows of C, 1, columns of C, 1, 1] times [1, rows of D, 1, columns of D, kernel]
    second = second.flatten(2) if second.ndim > 2 else second[..., None]
    found = first[:, None, :, None, None] * second[None, :, None]
    return found.reshape(rows * second.shape[0], columns * second.shape[1], -1)


_LOKR_1 = ("lokr_w1_a", "lokr_w1_b", "")
_LOKR_2 = ("lokr_w2_a", "lokr_w2_b", "lokr_t2")


def _factor(tensors: Mapping[Role, Tensor], left: str, right: str, core: str) -> Tensor:
    """Return a low-rank product [rows, columns, ...], with or without a core."""
    a, b = tensors[_role(left)], tensors[_role(right)]
    if core in tensors:
        return torch.einsum("ij...,ip,jr->pr...", tensors[_role(core)], a, b)
    product = a @ b.flatten(1)
    return product.reshape(len(product), *b.shape[1:])


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give a weight the norms of DoRA: m * V / |V|.

    Args:
        weight: the changed weight V, [out, in] or [out, in, height, width].
        magnitude: m, a number per output [out, 1, ...] or per input [1, in, ...].
    """
    shape = magnitude.reshape(*magnitude.shape, *(1 for _ in range(weight.ndim - magnitude.ndim)))
    kept = 0 if shape.shape[0] == weight.shape[0] else 1
    others = [d for d in range(weight.ndim) if d != kept]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    # the constant is LyCORIS' own
    return weight * (shape / (norm + torch.finfo(norm.dtype).eps))
