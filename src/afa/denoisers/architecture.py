"""Whether denoisers are of one architecture.

One architecture can be written in several ways: a number for all levels or a list, a default or
nothing, `swish` or `silu`. Configurations are compared in one form, see `canonical`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import ModelMixin

# what may differ between experts of one architecture
_FREE_CONFIG = frozenset({"sample_size", "upcast_attention", "dropout"})
_ACTIVATIONS = ("act_fn", "time_embedding_act_fn", "timestep_post_act", "activation_fn")


def difference(
    first: Mapping[str, Any], other: Mapping[str, Any], model_class: Any = None
) -> tuple[str, object, object] | None:
    """The first entry of two denoisers' configurations that makes their architectures differ.

    Args:
        first: the first configuration.
        other: the other one.
        model_class: the library's class of both, which gives the defaults; None compares the
            entries as they are written.

    Returns: its name and both values, as they are written, or None.
    """
    ours, theirs = canonical(first, model_class), canonical(other, model_class)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        same = ours.get(key) == theirs.get(key)
        if not (same or key.startswith("_") or key in _FREE_CONFIG):
            written = _tuples(first.get(key)), _tuples(other.get(key))
            if written[0] == written[1]:  # it differs by what another entry means for it
                written = ours.get(key), theirs.get(key)
            return key, *written
    return None


def check_same_architecture(first: ModelMixin, other: ModelMixin, name: str) -> None:
    """Refuse an expert whose family or configuration differs from the first one's.

    Raises:
        AfaError: names the first entry that differs, with both values.
    """
    from afa.denoisers.sites import family_of

    families = family_of(first), family_of(other)
    if families[0] is not families[1]:
        raise AfaError(
            f"Experts must share one architecture: {name} is of the family '{families[1].name}', "
            f"the first expert of '{families[0].name}'. Ensemble checkpoints of one family."
        )
    found = difference(first.config, other.config, type(first))
    if found is not None:
        key, expected, came = found
        raise AfaError(
            f"Experts must share one architecture: {name} has {key} = {came}, the first expert "
            f"has {expected}. Ensemble checkpoints of one family."
        )


def with_defaults(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, with the library's defaults for what it leaves out.

    Entries that the class does not take are left out, as `unknown_entries` lists them.
    """
    taken = inspect.signature(model_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in taken if p.default is not inspect.Parameter.empty}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken)
    known = {key: value for key, value in config.items() if takes_any or key in defaults}
    return {**defaults, **known}


def unknown_entries(model_class: Any, config: Mapping[str, Any]) -> list[str]:
    """Entries that the installed class does not know and that ask for something.

    Newer versions write entries that older ones lack; empty ones ask for nothing.
    """
    taken = inspect.signature(model_class.__init__).parameters
    return [
        key
        for key, value in config.items()
        if not (key in taken or key.startswith("_") or value is None or value is False)
    ]


def canonical(config: Mapping[str, Any], model_class: Any = None) -> dict[str, Any]:
    """A denoiser's configuration in the one form in which configurations are compared.

    Args:
        config: as a file has it, or of a model.
        model_class: the library's class, which gives the defaults; None leaves them out.

    Returns: the same, with tuples for lists, defaults filled in, entries that the class does not
        know left out, and entries that it does not use for this model set to None. The library's
        own meaning of each entry is in `diffusers.models`.
    """
    found = dict(config) if model_class is None else with_defaults(model_class, config)
    found = {key: _tuples(value) for key, value in found.items()}
    for key in _ACTIVATIONS:
        if isinstance(found.get(key), str):
            found[key] = {"swish": "silu"}.get(found[key].lower(), found[key].lower())
    bases = (base.__name__ for base in getattr(model_class, "__mro__", ()))
    forms = next((_FORMS[name] for name in bases if name in _FORMS), None)
    if forms is not None:
        with suppress(LookupError, TypeError, ValueError):  # building it says what is wrong
            forms(found)
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


# -- U-Nets -----------------------------------------------------------------------------------


def _unet(config: dict[str, Any]) -> None:
    """Lists for every number that stands for all levels; None where no block reads it."""
    for key in ("down_block_types", "up_block_types"):
        config[key] = tuple(name.removeprefix("UNetRes") for name in config[key])
    down, up = config["down_block_types"], config["up_block_types"]
    levels = len(down)
    last = [False] * (levels - 1) + [config["mid_block_type"] is not None]
    # the levels whose blocks attend at all, and those whose blocks read the text
    attends, reads = (
        [mark in a or mark in b or c for a, b, c in zip(down, reversed(up), last, strict=True)]
        for mark in ("Attn", "CrossAttn")
    )
    layers = _per_level(config["layers_per_block"], levels)
    config["layers_per_block"] = layers
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    config["num_attention_heads"] = None
    config["attention_head_dim"] = _masked(_per_level(heads, levels), attends)
    if config["encoder_hid_dim"] is None:
        widths = _per_level(config["cross_attention_dim"], levels)
        config["cross_attention_dim"] = _masked(widths, reads)
    only = config["only_cross_attention"]
    middle = config["mid_block_only_cross_attention"]
    if middle is None:
        middle = only if isinstance(only, bool) else False
    is_simple = config["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn"
    config["mid_block_only_cross_attention"] = middle if is_simple else None
    config["only_cross_attention"] = _masked(_per_level(only, levels), reads)
    _transformer_layers(config, layers)
    if config["time_embedding_dim"] is None:
        times = {"positional": 4, "fourier": 2}[config["time_embedding_type"]]
        config["time_embedding_dim"] = times * config["block_out_channels"][0]
    added, labels = config["addition_embed_type"], config["class_embed_type"]
    unused = {
        "addition_embed_type_num_heads": added != "text",
        "addition_time_embed_dim": added != "text_time",
        "projection_class_embeddings_input_dim": added != "text_time"
        and labels not in ("projection", "simple_projection"),
    }
    config.update({key: None for key, is_unused in unused.items() if is_unused})


def _transformer_layers(config: dict[str, Any], layers: Sequence[int]) -> None:
    """The transformer layers of every attention, down, in the middle and up."""
    down, up = config["down_block_types"], config["up_block_types"]
    asked = _per_level(config["transformer_layers_per_block"], len(down))
    backwards = config["reverse_transformer_layers_per_block"]
    backwards = asked[::-1] if backwards is None else _per_level(backwards, len(up))
    numbers = zip(backwards, up, reversed(layers), strict=True)
    config["reverse_transformer_layers_per_block"] = tuple(
        _per_level(n, count + 1) if "CrossAttn" in name else None for n, name, count in numbers
    )
    numbers = zip(asked, down, layers, strict=True)
    in_levels = [
        _per_level(n, count) if "CrossAttn" in name else None for n, name, count in numbers
    ]
    has_middle = "CrossAttn" in (config["mid_block_type"] or "")
    middle = asked[-1][0] if isinstance(asked[-1], tuple) else asked[-1]
    config["transformer_layers_per_block"] = (*in_levels, middle if has_middle else None)


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


def _masked(values: Sequence[Any], used: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(v if is_used else None for v, is_used in zip(values, used, strict=True))


# -- transformers -----------------------------------------------------------------------------


def _transformer(config: dict[str, Any]) -> None:
    """As many channels out as in, where nothing is said."""
    if config.get("out_channels") is None:
        config["out_channels"] = config["in_channels"]


def _pixart(config: dict[str, Any]) -> None:
    _transformer(config)
    if config["use_additional_conditions"] is None:
        config["use_additional_conditions"] = config["sample_size"] == 128


_FORMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _transformer,
    "SD3Transformer2DModel": _transformer,
    "DiTTransformer2DModel": _transformer,
    "PixArtTransformer2DModel": _pixart,
}
