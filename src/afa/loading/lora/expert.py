"""Merge a LoRA into a copy of its base that shares the base's memory.

N LoRAs of one base need the memory of about one model: each expert is a copy of the base's modules
with the same parameters, and has its own only in layers that its LoRA changes (W + scale * dW).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from afa.denoisers.kinds import kind_of
from afa.denoisers.packed import unpack_layers
from afa.ensemble.references import LoraReference
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.components import loading_model
from afa.loading.lora.file import hash_lora, open_lora, read_tensors
from afa.loading.single_file.conversion import model_class_of, without_data
from afa.lora.lycoris import rank_of
from afa.lora.merge import merged
from afa.lora.plan import Base, plan_changes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.loading.expert_source import ExpertSource
    from afa.loading.loaded import Expert
    from afa.lora.header import LoraFile
    from afa.lora.names import Role
    from afa.lora.plan import Change


def lora_expert(base: Expert, asked: ExpertSource) -> Expert:
    """Merge a LoRA into a copy of its base that shares all unchanged parameters.

    Args:
        base: loaded; it is not changed.

    Raises:
        AfaError: if the file is missing, a pickle, damaged or not a LoRA, or has a tensor that
            cannot be applied to this base; see `plan_changes`.
    """
    assert asked.lora is not None, "checked by the caller"
    source = Path(asked.lora).expanduser()
    lora = open_lora(source)
    reference = LoraReference(str(source.absolute()), hash_lora(source), asked.scale)
    if asked.lora_sha256 not in (None, reference.sha256):
        raise AfaError(
            "AFA-LOAD-031",
            f"The LoRA '{lora.path}' has SHA-256 {reference.sha256}; the ensemble was trained with "
            f"{asked.lora_sha256}. Restore that file, or train again.",
        )
    models = {base.kind.denoiser: base.denoiser, **base.text_encoders}
    changes = plan_changes(lora, Base.of(asked.source, base.kind, models), asked.scale)
    by_part: defaultdict[str, list[Change]] = defaultdict(list)
    for change in changes:
        by_part[change.part].append(change)
    # an unchanged text encoder stays the base's object, so that it runs only once
    copies = {part: shared_copy(models[part]) for part in {base.kind.denoiser, *by_part}}
    for part, each in by_part.items():
        _merge(copies[part], lora, each, asked.scale)
    return replace(
        base,
        reference=replace(base.reference, lora=reference),
        denoiser=copies[base.kind.denoiser],
        text_encoders={name: copies.get(name, own) for name, own in base.text_encoders.items()},
    )


def check_lora(asked: ExpertSource, config: Path, *, with_values: bool = True) -> None:
    """Raise the errors of `lora_expert`, without the base's weights.

    Args:
        config: the pipeline folder that describes the base.
        with_values: whether to check the LoRA's values for NaN or infinity, too.

    Raises:
        AfaError: see `lora_expert`.
    """
    assert asked.lora is not None, "checked by the caller"
    lora = open_lora(Path(asked.lora))
    index = read_json(config / "model_index.json")
    kind = kind_of(str(index.get("_class_name")), asked.source)
    models: dict[str, nn.Module] = {}
    with loading_model(asked.source):
        encoders = [part for part in parts_of(index) if part.startswith("text_encoder")]
        classes = {part: model_class_of(part, config) for part in encoders}
        for part, model_class in {kind.denoiser: kind.family.model_class, **classes}.items():
            settings = read_json(config / part / "config.json")
            models[part] = without_data(model_class, settings)
    changes = plan_changes(lora, Base.of(asked.source, kind, models), asked.scale)
    if with_values:
        for _ in read_tensors(lora, (change.tensors for change in changes)):
            pass


def shared_copy(module: Any) -> Any:
    """Copy a module, but share its parameters and buffers."""
    kept = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def _shapes(tensors: Mapping[Role, torch.Tensor]) -> dict[Role, tuple[int, ...]]:
    return {role: tuple(tensor.shape) for role, tensor in tensors.items()}


@torch.no_grad()
def _merge(model: nn.Module, lora: LoraFile, changes: list[Change], scale: float) -> None:
    """Replace the parameters of every changed layer by merged ones.

    Quantised layers that are changed are dequantised, because the merge has no quantised form.
    """
    unpack_layers(model, {rows.layer for change in changes for rows in change.rows})
    parameters = dict(model.named_parameters())
    owners: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():  # several modules may share a parameter, such as T5's embedding
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append((module, name))
    read = read_tensors(lora, (change.tensors for change in changes))
    for change, tensors in zip(changes, read, strict=True):
        rank = len(tensors["down"]) if "down" in tensors else rank_of(_shapes(tensors))
        has_alpha = "alpha" in tensors and rank is not None
        alpha, rank = tensors["alpha"].item() if has_alpha else None, rank or 1
        by = lora.factor(change.layer, rank, alpha)
        for name, value in merged(tensors, change.rows, parameters, by, scale):
            old = parameters[name]
            new = value.to(old)
            if not torch.isfinite(new).all():
                raise AfaError(
                    "AFA-LOAD-032",
                    f"The LoRA '{lora.path}' makes '{name}' non-finite (NaN or infinity) in "
                    f"{str(old.dtype).removeprefix('torch.')}. Merged weights must be finite. "
                    "Lower the scale, or use bfloat16 or float32.",
                )
            # not in place: other experts share the base's parameter
            parameter = nn.Parameter(new, requires_grad=False)
            for module, own in owners[id(old)]:
                setattr(module, own, parameter)
