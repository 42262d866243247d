"""What a merge does besides averaging, in sentences for whoever runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from afa.merging.block_weights import DEFAULT
from afa.merging.model_kinds import INPUT_LAYERS, model_kind
from afa.merging.objectives import prediction_type
from afa.merging.optional import is_optional
from afa.merging.parts import OTHER_PARTS, block_keys, part_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from afa.merging.plan import MergePlan

_NUM_NAMED = 5
_PARTS = {
    "vae": "autoencoder",
    **{part: part.replace("_", " ") for part in OTHER_PARTS if part != "vae"},
}


def notes(plan: MergePlan) -> list[str]:
    """Everything of a merge that is not the plain merge of all checkpoints, a sentence each."""
    return [*_about_models(plan), *_about_tensors(plan), *_about_settings(plan)]


def _about_models(plan: MergePlan) -> Iterator[str]:
    checkpoints = plan.experts if plan.base is None else [*plan.experts, plan.base]
    if model_kind(plan.experts[0].tensors) is None:
        yield (
            f"'{plan.experts[0].source}' is of no known kind of model; tensors are compared by "
            "their names alone."
        )
    is_unet = any(name in plan.experts[0].tensors for name in INPUT_LAYERS)
    silent = [each.source for each in checkpoints if prediction_type(each) is None]
    if is_unet and silent and plan.predicts is not None:
        yield (
            f"Taken to predict {plan.predicts}, since nothing in the file says it: "
            f"{', '.join(silent)}"
        )


def _about_tensors(plan: MergePlan) -> Iterator[str]:
    first, tensors = plan.experts[0].source, plan.tensors
    if plan.unknown:
        yield f"Of no known part, merged like the others: {_named(plan.unknown)}"
    vae = [tensor.name for tensor in tensors if tensor.is_autoencoder]
    if vae:
        yield f"Autoencoder taken from '{first}' (vae: first): {len(vae)} tensors"
    if plan.kept:
        yield f"Not merged, taken from '{first}': {_grouped(plan.kept)}"
    if any(name.startswith("model_ema.diffusion_model") for name in plan.kept):
        yield (
            f"The averaged weights (model_ema.) are those of '{first}' alone: a program that is "
            "told to load them draws that expert, not the merge."
        )
    for source, names in plan.left_out.items():
        yield f"Left out of '{source}', since '{first}' lacks it: {_grouped(names)}"
    repaired = [tensor.name for tensor in tensors if tensor.is_repaired]
    if repaired:
        yield (
            f"Repaired, since '{first}' has rounded or averaged positions: {_named(repaired)} now "
            "counts 0, 1, 2, ..."
        )
    padded = [tensor for tensor in tensors if tensor.is_padded]
    if padded:
        inputs = [s for t in padded[:1] for s in (*t.sources, *([t.base] if t.base else []))]
        count = min(source.shape[1] for source in inputs)
        yield (
            f"Padded with zeros to {padded[0].shape[1]} input channels, where a checkpoint has "
            f"{count}: {_named([tensor.name for tensor in padded])}. The extra channels are merged "
            "with those zeros."
        )


def _about_settings(plan: MergePlan) -> Iterator[str]:
    given = plan.recipe.block_weights
    if isinstance(given, Mapping):
        keys = block_keys([tensor.name for tensor in plan.tensors])
        used = {keys.get(tensor.name) for tensor in plan.tensors if tensor.is_merged}
        idle = [key for key in given if key not in used and key != DEFAULT]
        if idle:
            yield f"Without effect, since nothing there is merged: block_weights of {_named(idle)}"
    inputs = {s.dtype for t in plan.tensors if t.is_merged for s in t.sources}
    if len(inputs) > 1:
        written = Counter(tensor.dtype for tensor in plan.tensors if tensor.is_merged)
        types = ", ".join(f"{_type(dtype)} ({count})" for dtype, count in written.most_common())
        rule = "recipe's dtype" if plan.recipe.dtype else f"type of '{plan.experts[0].source}'"
        yield (
            f"Mixed types ({', '.join(sorted(map(_type, inputs)))}): computed in float32, written "
            f"in the {rule}: {types}"
        )


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _grouped(names: Iterable[str]) -> str:
    """Names, whole parts and averaged weights as one each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = name if is_optional(name) else _PARTS.get(part_of(name) or "", name)
        key = "model_ema.*" if name.startswith("model_ema.") else key
        groups.setdefault(key, []).append(name)
    said = [f"{g} ({len(n)} tensors)" if len(n) > 1 else n[0] for g, n in groups.items()]
    return _named(said)


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more, see the record" if more > 0 else "")
