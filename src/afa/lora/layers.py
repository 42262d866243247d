"""All names that LoRAs use for the layers of a model.

These are the library's names and those of the original layouts, see
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

#: flattened name -> the layers that it combines
Names = dict[str, tuple[Rows, ...]]


def names_of(layers: Iterable[str], family: Family | None) -> Names:
    """Return all names of a part's layers.

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
        if layer.endswith(".to_out.0"):  # in files of attention processors
            yield layer.removesuffix(".0"), (Rows(layer),)


# -- text encoders ----------------------------------------------------------------------------

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_encoder(layers: list[str]) -> Iterator[OriginalName]:
    """Yield CLIP's layers with and without `text_model.`, by the version of transformers."""
    for layer in layers:
        bare = layer.removeprefix("text_model.")
        place, _, last = bare.rpartition(".")
        for name in (bare, f"{place}.{_OLD_ATTENTION.get(last, last)}"):
            yield name, (Rows(layer),)
            yield f"text_model.{name}", (Rows(layer),)
