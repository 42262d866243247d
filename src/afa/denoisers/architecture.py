"""Whether denoisers are of one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import ModelMixin

# what may differ between experts of one architecture
_FREE_CONFIG = frozenset({"sample_size", "upcast_attention", "dropout"})


def difference(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, object, object] | None:
    """The first entry of two denoisers' configurations that makes their architectures differ.

    Returns: its name and both values, or None.
    """
    for key, expected in first.items():
        came = other.get(key)
        same = _as_tuple(expected) == _as_tuple(came)
        if not (same or key.startswith("_") or key in _FREE_CONFIG):
            return key, _as_tuple(expected), _as_tuple(came)
    return None


def check_same_architecture(first: ModelMixin, other: ModelMixin, name: str) -> None:
    """Refuse an expert whose family or configuration differs from the first one's.

    Raises:
        AfaError: names the first entry that differs, with both values.
    """
    from afa.denoisers import family_of

    families = family_of(first), family_of(other)
    if families[0] is not families[1]:
        raise AfaError(
            f"Experts must share one architecture: {name} is of the family '{families[1].name}', "
            f"the first expert of '{families[0].name}'. Ensemble checkpoints of one family."
        )
    found = difference(first.config, other.config)
    if found is not None:
        key, expected, came = found
        raise AfaError(
            f"Experts must share one architecture: {name} has {key} = {came}, the first expert "
            f"has {expected}. Ensemble checkpoints of one family."
        )


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
