"""Whether denoisers are of one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import ModelMixin

# what may differ between experts of one architecture
_FREE_CONFIG = frozenset({"sample_size", "upcast_attention", "dropout"})


def check_same_architecture(first: ModelMixin, other: ModelMixin, name: str) -> None:
    """Refuse an expert whose configuration differs from the first one's.

    Raises:
        AfaError: names the first entry that differs, with both values.
    """
    for key, expected in first.config.items():
        came = other.config.get(key)
        same = _as_tuple(expected) == _as_tuple(came)
        if not (same or key.startswith("_") or key in _FREE_CONFIG):
            raise AfaError(
                f"Experts must share one architecture: {name} has {key} = {_as_tuple(came)}, the "
                f"first expert has {_as_tuple(expected)}. Ensemble checkpoints of one family."
            )


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
