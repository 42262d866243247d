"""Compare the architectures of denoisers by their configurations.

One architecture can be written in several ways: one number for all levels or a list, a default or
no entry, `swish` or `silu`. Configurations are compared in a canonical form; see `canonical`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from afa.denoisers.sites import families_of_class, family_of
from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import ModelMixin

# entries that may differ between experts of one architecture
_FREE_CONFIG = frozenset({"sample_size", "upcast_attention", "dropout"})
_ACTIVATIONS = ("act_fn", "time_embedding_act_fn", "timestep_post_act", "activation_fn")


def difference(
    first: Mapping[str, Any], other: Mapping[str, Any], model_class: Any = None
) -> tuple[str, object, object] | None:
    """Find the first entry of two configurations that makes the architectures differ.

    Args:
        model_class: the diffusers class of both, which defines the defaults; None compares the
            entries as they are written.

    Returns: the entry's name and both values as they are written; None if there is none.
    """
    ours, theirs = canonical(first, model_class), canonical(other, model_class)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        same = ours.get(key) == theirs.get(key)
        if not (same or key.startswith("_") or key in _FREE_CONFIG):
            written = _tuples(first.get(key)), _tuples(other.get(key))
            if written[0] == written[1]:  # the difference comes from another entry
                written = ours.get(key), theirs.get(key)
            return key, *written
    return None


def check_same_architecture(first: ModelMixin, other: ModelMixin, name: str) -> None:
    """Check that an expert has the first expert's family and architecture.

    Raises:
        AfaError: if not; it names the first entry that differs, with both values.
    """
    families = family_of(first), family_of(other)
    if families[0] is not families[1]:
        raise AfaError(
            "AFA-MODEL-001",
            f"Experts must share one architecture: {name} is of the family '{families[1].name}', "
            f"the first expert of '{families[0].name}'. Ensemble checkpoints of one family.",
        )
    ours = families[0].interface
    found = difference(ours.config(first), ours.config(other), ours.defaults(first))
    if found is not None:
        key, expected, got = found
        raise AfaError(
            "AFA-MODEL-002",
            f"Experts must share one architecture: {name} has {key} = {got}, the first expert "
            f"has {expected}. Ensemble checkpoints of one family.",
        )


def with_defaults(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the class's defaults in a model's configuration.

    Entries that the class does not know are removed; see `unknown_entries`.
    """
    taken = inspect.signature(model_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in taken if p.default is not inspect.Parameter.empty}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken)
    known = {key: value for key, value in config.items() if takes_any or key in defaults}
    return {**defaults, **known}


def unknown_entries(model_class: Any, config: Mapping[str, Any]) -> list[str]:
    """List the entries that the installed class does not know and that are neither None nor False.

    Newer versions of diffusers write new entries; None and False mean that they are unused.
    """
    taken = inspect.signature(model_class.__init__).parameters
    return [
        key
        for key, value in config.items()
        if not (key in taken or key.startswith("_") or value is None or value is False)
    ]


def canonical(config: Mapping[str, Any], model_class: Any = None) -> dict[str, Any]:
    """Bring a denoiser's configuration into the canonical form in which architectures are compared.

    Args:
        model_class: the diffusers class, which defines the defaults; None adds no defaults.

    Returns: a copy with tuples for lists, with defaults, without entries that the class does not
        know, and with None for entries that this model does not use.
    """
    found = dict(config) if model_class is None else with_defaults(model_class, config)
    found = {key: _tuples(value) for key, value in found.items()}
    for key in _ACTIVATIONS:
        if isinstance(found.get(key), str):
            found[key] = {"swish": "silu"}.get(found[key].lower(), found[key].lower())
    rewrite = next(
        (f.canonical_config for f in families_of_class(model_class) if f.canonical_config), None
    )
    if rewrite is not None:
        with suppress(LookupError, TypeError, ValueError):  # building the model reports it
            rewrite(found)
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
