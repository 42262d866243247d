"""Plan each tensor of a merge: which tensors of which checkpoints it is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from afa.denoisers.family import COMPONENTS
from afa.errors import AfaError
from afa.loading.tensor_files import StoredTensor, TensorSpec
from afa.merging.checkpoints import Checkpoint
from afa.merging.method import is_finite, is_kept
from afa.merging.model_kinds import is_input_layer
from afa.merging.optional import damaged_positions, is_optional, is_schedule
from afa.merging.parts import part_of
from afa.merging.recipe import MergeRecipe

_DENOISERS = (*COMPONENTS, None)
_MAX_BUFFER = 100_000  # entries; a noise schedule has a thousand


@dataclass(frozen=True)
class PlannedTensor(TensorSpec):
    """One tensor of the result; `dtype` and `shape` are the result's.

    Attributes:
        name: for methods and records; the tensor's name in the files if it is the same in all.
        key: its name in the output file.
        sources: the experts' tensors, or the one that is copied. Those of the input layer may have
            fewer channels than the result, and are padded with zeros.
        base: the base's tensor, if the method needs it.
        is_merged: False if the tensor is copied from the first expert.
        is_autoencoder: whether it belongs to an autoencoder that is copied from the first expert.
        is_repaired: whether it contains a text encoder's positions, which were damaged.
        is_buffer: whether it is a buffer, which may contain infinity.
    """

    name: str
    key: str
    sources: Sequence[StoredTensor]
    base: StoredTensor | None
    is_merged: bool
    is_autoencoder: bool = False
    is_repaired: bool = False
    is_buffer: bool = False

    @property
    def inputs(self) -> list[StoredTensor]:
        """The experts' tensors and the base's."""
        return [*self.sources, *([] if self.base is None else [self.base])]

    @property
    def is_padded(self) -> bool:
        """Whether a checkpoint's tensor is padded with zeros."""
        return any(each.shape != self.shape for each in self.inputs)

    @property
    def num_bytes_read(self) -> int:
        """Number of bytes to read for it."""
        return sum(each.num_bytes for each in self.inputs)


def plan_tensors(
    compared: Sequence[Checkpoint], recipe: MergeRecipe
) -> tuple[list[PlannedTensor], dict[str, list[str]]]:
    """Plan the tensors of a merge, which are those of the first expert.

    Tensors that all checkpoints have are merged. If a checkpoint lacks a component other than the
    denoiser, or an optional tensor (see `afa.merging.optional`), the first expert's is copied; what
    the first expert lacks is dropped. Any other missing tensor is an error.

    Args:
        compared: the experts, followed by the base if the recipe has one.
        recipe: the merge.

    Returns: the tensors; and for every other expert the tensors that the first one lacks.

    Raises:
        AfaError: if the checkpoints have different architectures.
    """
    has_base = recipe.base is not None
    first, experts = compared[0], compared[:-1] if has_base else compared
    parts = [{part_of(name) for name in checkpoint.tensors} for checkpoint in compared]
    left_out: dict[str, list[str]] = {}
    for number, other in enumerate(compared):
        for name in other.tensors.keys() - first.tensors.keys():
            part = part_of(name)
            is_first_only = recipe.vae == "first" and part == "vae"
            if not is_first_only and not _may_lack(name, parts[0]):
                _refuse_missing(name, other, first)
            if number < len(experts) and not (is_first_only and "vae" in parts[0]):
                left_out.setdefault(other.source, []).append(name)
    planned = []
    for name, tensor in first.tensors.items():
        is_autoencoder = recipe.vae == "first" and part_of(name) == "vae"
        lacking = [n for n, each in enumerate(compared) if name not in each.tensors]
        if not is_autoencoder:
            for number in lacking:
                if not _may_lack(name, parts[number]):
                    _refuse_missing(name, first, compared[number])
        is_buffer = is_schedule(name)
        is_merged = not (
            is_autoencoder
            or lacking
            or is_kept(name, tensor.dtype)
            or (is_buffer and not _is_finite(tensor))
        )
        if is_merged:
            _check_shapes(name, compared)
        dtype = tensor.dtype
        if recipe.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, recipe.dtype)
        is_repaired = damaged_positions(name, tensor, dtype)
        having = [each for each in compared if name in each.tensors]
        planned.append(
            PlannedTensor(
                dtype=torch.int64 if is_repaired else dtype,
                shape=tensor.shape,
                name=_label(name, having),
                key=first.keys[name],
                sources=[e.tensors[name] for e in experts] if is_merged else [tensor],
                base=compared[-1].tensors[name] if is_merged and has_base else None,
                is_merged=is_merged,
                is_autoencoder=is_autoencoder,
                is_repaired=is_repaired,
                is_buffer=is_buffer or name.endswith("attn_mask"),
            )
        )
    return planned, {source: sorted(names) for source, names in left_out.items()}


def _label(name: str, having: Sequence[Checkpoint]) -> str:
    """A tensor's name for methods and records: its name in the files if equal, or the canonical.

    DARE seeds its masks with it, so that masks of files with one layout do not change.
    """
    if having[0].path.is_dir():
        return name
    keys = {each.keys[name] for each in having}
    return keys.pop() if len(keys) == 1 else name


def _may_lack(name: str, parts: set[str | None]) -> bool:
    """Whether a checkpoint with these components may lack a tensor."""
    part = part_of(name)
    return is_optional(name) or (part not in _DENOISERS and part not in parts)


def _refuse_missing(name: str, having: Checkpoint, lacking: Checkpoint) -> None:
    part = part_of(name)
    same = [n for n in having.tensors if part_of(n) == part]
    others = sum(n not in lacking.tensors for n in same) - 1
    also = f" (and {others} more of the {len(same)} in this component)" if others else ""
    raise AfaError(
        "AFA-MERGE-009",
        f"The architectures differ: '{name}' has shape {having.tensors[name].shape} in "
        f"'{having.source}' and is missing in '{lacking.source}'{also}. Merge checkpoints of one "
        "architecture.",
    )


def _check_shapes(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    ours = first.tensors[name].shape
    for other in checkpoints[1:]:
        theirs = other.tensors[name].shape
        if ours != theirs and not (is_input_layer(name) and _can_be_padded(theirs, ours)):
            raise AfaError(
                "AFA-MERGE-010",
                f"The architectures differ: '{name}' has shape {ours} in '{first.source}' and "
                f"{theirs} in '{other.source}'. Merge checkpoints of one architecture.",
            )


def _can_be_padded(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether only the second dimension, the input channels, is smaller."""
    return (
        len(shape) == len(to) == 4
        and shape[1] < to[1]
        and (shape[0], *shape[2:]) == (to[0], *to[2:])
    )


def _is_finite(tensor: StoredTensor) -> bool:
    return torch.Size(tensor.shape).numel() > _MAX_BUFFER or is_finite(tensor.read())
