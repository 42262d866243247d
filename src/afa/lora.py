"""A LoRA on a base as an expert that shares the base's memory.

N LoRAs of one base cost about one model: each expert is a copy of the base's modules around the
very same parameters, and owns only those of the layers that its LoRA changes (W + scale * dW).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag
from safetensors import safe_open
from torch import nn

from afa.errors import AfaError
from afa.kinds import build_pipeline
from afa.recipe import Section
from afa.sources import LoraReference
from afa.trust.pickles import as_safetensors
from afa.weights import PICKLES, check_safetensors, hash_file, loading

if TYPE_CHECKING:
    from afa.experts import Expert

_ADAPTER = "expert"


class LoraExpert(Section):
    """An expert that is a LoRA on a base, as it stands in a recipe.

    Attributes:
        base: as any expert: a folder, a file, a hub id or `zoo:base`.
        lora: a local `.safetensors` file, in the layout of diffusers or of kohya's scripts; for the
            denoiser, the text encoders or both.
        scale: of what it adds.
        sha256: that the LoRA's file must have; None takes any.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("base", "lora")

    base: str
    lora: str
    scale: float = Field(default=1.0, ge=-10, le=10)
    sha256: str | None = None


def _kind(given: Any) -> str:
    return "LoraExpert" if isinstance(given, (Mapping, LoraExpert)) else "source"


#: an expert as recipes name it: a source, or a LoRA on one
AnyExpert = Annotated[
    Annotated[str, Tag("source")] | Annotated[LoraExpert, Tag("LoraExpert")], Discriminator(_kind)
]


def base_of(expert: str | Path | LoraExpert) -> str | Path:
    """Where an expert, or the base of its LoRA, comes from."""
    return expert.base if isinstance(expert, LoraExpert) else expert


def lora_expert(base: Expert, asked: LoraExpert) -> Expert:
    """The base with a LoRA, sharing all parameters that the LoRA leaves alone.

    Args:
        base: loaded; it is not changed.
        asked: which LoRA, and its scale.

    Raises:
        AfaError: the file is missing, a pickle or damaged, no LoRA, or one of another kind of
            model.
    """
    source, file = Path(asked.lora).expanduser(), lora_file(asked)
    reference = LoraReference(str(source.absolute()), hash_file(file), asked.scale)
    if asked.sha256 not in (None, reference.sha256):
        raise AfaError(
            f"The LoRA '{file}' must have SHA-256 {asked.sha256}, with which the ensemble was "
            f"trained, has {reference.sha256}. Restore that file, or train again."
        )
    denoiser, encoders = (
        shared_copy(base.denoiser),
        {name: shared_copy(encoder) for name, encoder in base.text_encoders.items()},
    )
    parts = {base.kind.denoiser: denoiser, **encoders}
    must = f"'{file}' must be a LoRA for the {base.kind.name} model '{base.reference.source}'"
    with loading(must, "Name one that was trained on this kind of model."):
        pipeline: Any = build_pipeline(
            base.class_name,
            {**parts, **base.tokenizers, "scheduler": base.scheduler, "vae": None},
            base.options,
        )
        pipeline.load_lora_weights(str(file), adapter_name=_ADAPTER)
    changed = {name: _merge(part, asked.scale) for name, part in parts.items()}
    if not any(changed.values()):
        raise AfaError(f"{must}; none of its weights fits a layer there. Name another one.")
    pipeline.unload_lora_weights()
    return replace(
        base,
        reference=replace(base.reference, lora=reference),
        denoiser=denoiser,
        # a copy without any change is the base's own encoder, which then runs once for all
        text_encoders={
            name: encoder if changed[name] else base.text_encoders[name]
            for name, encoder in encoders.items()
        },
    )


def shared_copy(module: Any) -> Any:
    """Modules of its own around the very same parameters and buffers."""
    kept = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def _merge(model: nn.Module, scale: float) -> int:
    """Give every layer with an adapter a weight of its own, with the LoRA in it; counts them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    count = 0
    for layer in list(model.modules()):
        if isinstance(layer, BaseTunerLayer):
            base, added = layer.get_base_layer(), layer.get_delta_weight(_ADAPTER)
            merged = base.weight.detach().float() + scale * added.float()
            # not in place: the base's own weight is every other expert's
            base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
            count += 1
    return count


def lora_file(asked: LoraExpert) -> Path:
    """The safetensors file of a LoRA that can be added to weights.

    Raises:
        AfaError: see `lora_expert`.
    """
    file = Path(asked.lora).expanduser()
    if file.suffix.lower() in PICKLES:
        file = as_safetensors(file, "A LoRA")
    if not file.is_file():
        raise AfaError(f"A LoRA must be a local file; '{file}' does not exist. Download it first.")
    check_safetensors(file)
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    refused = {"dora_scale": "DoRA", "hada_w1": "LoHa", "lokr_w1": "LoKr", "oft_": "OFT"}
    for mark, kind in refused.items():
        found = next((name for name in names if mark in name), None)
        if found is not None:
            raise AfaError(
                f"A LoRA must add low-rank products to weights; '{file}' is a {kind} ('{found}'). "
                "Merge it into a checkpoint with the tool it is from, and name that as the expert."
            )
    return file
