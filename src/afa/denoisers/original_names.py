"""Layers of transformers under the names that the original codes have for them.

One of their layers may join what are several layers in the library (`qkv`), and has scale and
shift of the last modulation the other way round, as the library's converters of single files say
(`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    #: a name in the original code, and the layers of the library that it joins
    OriginalName = tuple[str, tuple["Rows", ...]]

_LAST = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Rows:
    """The rows of a named layer that are one layer of the library, in order.

    Attributes:
        layer: the library's name.
        is_swapped: whether the two halves of the rows are the other way round.
    """

    layer: str
    is_swapped: bool = False


def outside(table: dict[str, str], known: set[str]) -> Iterator[OriginalName]:
    """The layers outside of the blocks that a model has.

    Args:
        table: the original code's name -> the library's.
        known: the library's names of the model's layers.
    """
    for name, layer in table.items():
        if layer in known:
            yield name, (Rows(layer),)
    if "norm_out.linear" in known:
        yield _LAST, (Rows("norm_out.linear", is_swapped=True),)


def joined_blocks(
    theirs: str, ours: str, table: dict[str, str], known: set[str]
) -> Iterator[OriginalName]:
    """The layers of a model's blocks.

    Args:
        theirs: root of the names of all blocks in the original code.
        ours: the same in the library.
        table: name in a block in the original code -> the library's names, with spaces between.
        known: the library's names of the model's layers.
    """
    for n in range(depth(ours, known)):
        for name, layers in table.items():
            joined = [f"{ours}.{n}.{layer}" for layer in layers.split()]
            if known.issuperset(joined):
                yield f"{theirs}.{n}.{name}", tuple(map(Rows, joined))


def depth(blocks: str, known: set[str]) -> int:
    """How many blocks a model has.

    Args:
        blocks: root of their names.
        known: the names of the model's layers.
    """
    return len({name.split(".")[1] for name in known if name.startswith(f"{blocks}.")})
