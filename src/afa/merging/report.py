"""Notes for the user about tensors that a merge does not simply merge."""

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
    """List what the user should know about a merge, one sentence each."""
    return [*_about_models(plan), *_about_tensors(plan), *_about_settings(plan)]


def _about_models(plan: MergePlan) -> Iterator[str]:
    if model_kind(plan.experts[0].tensors) is None:
        yield (
            f"'{plan.experts[0].source}' is of an unknown kind of model; tensors are matched by "
            "name only."
        )
    is_unet = any(name in plan.experts[0].tensors for name in INPUT_LAYERS)
    unspecified = [each.source for each in plan.checkpoints if prediction_type(each) is None]
    if is_unet and unspecified and plan.predicts is not None:
        yield f"Assumed prediction type {plan.predicts}, not specified by {', '.join(unspecified)}"


def _about_tensors(plan: MergePlan) -> Iterator[str]:
    first, tensors = plan.experts[0].source, plan.tensors
    if plan.unknown:
        yield f"Unknown tensors, merged like the others: {_shortened(plan.unknown)}"
    vae = [tensor.name for tensor in tensors if tensor.is_autoencoder]
    if vae:
        yield f"Autoencoder copied from '{first}' (vae: first): {len(vae)} tensors"
    if plan.kept:
        yield f"Not merged, copied from '{first}': {_grouped(plan.kept)}"
    if any(name.startswith("model_ema.diffusion_model") for name in plan.kept):
        yield (
            f"The averaged weights (model_ema.) are copied from '{first}': a program that loads "
            "them uses that expert, not the merge."
        )
    for source, names in plan.left_out.items():
        yield f"Dropped from '{source}', because '{first}' lacks it: {_grouped(names)}"
    repaired = [tensor.name for tensor in tensors if tensor.is_repaired]
    if repaired:
        yield (
            f"Repaired rounded or averaged positions of '{first}': {_shortened(repaired)} is now "
            "0, 1, 2, ..."
        )
    padded = [tensor for tensor in tensors if tensor.is_padded]
    if padded:
        count = min(each.shape[1] for each in padded[0].inputs)
        yield (
            f"Padded with zeros from {count} to {padded[0].shape[1]} input channels: "
            f"{_shortened([tensor.name for tensor in padded])}. The other experts' extra channels "
            "are merged with these zeros."
        )


def _about_settings(plan: MergePlan) -> Iterator[str]:
    given = plan.recipe.block_weights
    if isinstance(given, Mapping):
        keys = block_keys([tensor.name for tensor in plan.tensors])
        used = {keys.get(tensor.name) for tensor in plan.tensors if tensor.is_merged}
        unused = [key for key in given if key not in used and key != DEFAULT]
        if unused:
            yield f"block_weights without effect, no tensor is merged there: {_shortened(unused)}"
    inputs = {s.dtype for t in plan.tensors if t.is_merged for s in t.sources}
    if len(inputs) > 1:
        written = Counter(tensor.dtype for tensor in plan.tensors if tensor.is_merged)
        types = ", ".join(f"{_type(dtype)} ({count})" for dtype, count in written.most_common())
        rule = "recipe's dtype" if plan.recipe.dtype else f"dtypes of '{plan.experts[0].source}'"
        yield (
            f"Mixed dtypes ({', '.join(sorted(map(_type, inputs)))}): computed in float32, written "
            f"in the {rule}: {types}"
        )


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _grouped(names: Iterable[str]) -> str:
    """Join names; components and averaged weights count as one name each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = name if is_optional(name) else _PARTS.get(part_of(name) or "", name)
        key = "model_ema.*" if name.startswith("model_ema.") else key
        groups.setdefault(key, []).append(name)
    return _shortened(
        [f"{g} ({len(n)} tensors)" if len(n) > 1 else n[0] for g, n in groups.items()]
    )


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more, see the record" if more > 0 else "")
