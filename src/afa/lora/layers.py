"""The layers of a model under all names that LoRAs have for them.

Besides the library's own names there are those of the original codes, see
`afa.denoisers.original_names`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.original_names import Rows
from afa.lora.names import flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from afa.denoisers import Family
    from afa.denoisers.original_names import OriginalName

#: flattened name -> the layers that it joins
Names = dict[str, tuple[Rows, ...]]


def names_of(layers: Iterable[str], family: Family | None) -> Names:
    """All names of a part's layers.

    Args:
        layers: the library's names.
        family: of the denoiser; None for a text encoder.
    """
    own = list(layers)
    found: Names = {}
    original = _text_encoder if family is None else family.original_layers
    for name, rows in (*_library(own), *(original(own) if original else ())):
        found.setdefault(flat(name), rows)
    return found


def _library(layers: list[str]) -> Iterator[OriginalName]:
    for layer in layers:
        yield layer, (Rows(layer),)
        if layer.endswith(".to_out.0"):  # as attention processors were saved
            yield layer.removesuffix(".0"), (Rows(layer),)


# -- text encoders ----------------------------------------------------------------------------

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_encoder(layers: list[str]) -> Iterator[OriginalName]:
    """CLIP's layers begin with `text_model.` or not, by the version of transformers."""
    for layer in layers:
        bare = layer.removeprefix("text_model.")
        place, _, last = bare.rpartition(".")
        for name in (bare, f"{place}.{_OLD_ATTENTION.get(last, last)}"):
            yield name, (Rows(layer),)
            yield f"text_model.{name}", (Rows(layer),)
