"""Names of transformers' layers in the models' original code.

One layer of the original code may join several layers of diffusers (`qkv`). In the last modulation,
scale and shift are in the opposite order; see the converters for single files in
`diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    #: a layer's name in the original code, and the rows of the diffusers layers that it joins
    OriginalName = tuple[str, tuple["Rows", ...]]

_LAST = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Rows:
    """The part of an original layer that is one layer of diffusers.

    Attributes:
        layer: the name in diffusers.
        is_swapped: whether the two halves of the rows are in the opposite order.
    """

    layer: str
    is_swapped: bool = False


def outside(table: dict[str, str], known: set[str]) -> Iterator[OriginalName]:
    """Yield the layers outside the blocks that a model has.

    Args:
        table: name in the original code -> name in diffusers.
        known: the names of the model's layers in diffusers.
    """
    for name, layer in table.items():
        if layer in known:
            yield name, (Rows(layer),)
    if "norm_out.linear" in known:
        yield _LAST, (Rows("norm_out.linear", is_swapped=True),)


def joined_blocks(
    theirs: str, ours: str, table: dict[str, str], known: set[str]
) -> Iterator[OriginalName]:
    """Yield the layers of a model's blocks.

    Args:
        theirs: the start of the blocks' names in the original code.
        ours: the start of the blocks' names in diffusers.
        table: name within a block in the original code -> names in diffusers, separated by spaces.
        known: the names of the model's layers in diffusers.
    """
    for n in range(depth(ours, known)):
        for name, layers in table.items():
            joined = [f"{ours}.{n}.{layer}" for layer in layers.split()]
            if known.issuperset(joined):
                yield f"{theirs}.{n}.{name}", tuple(map(Rows, joined))


def depth(blocks: str, known: set[str]) -> int:
    """The number of blocks of a model, from the names of its layers."""
    return len({name.split(".")[1] for name in known if name.startswith(f"{blocks}.")})
