"""Every tensor of a merge: made from which tensors of which checkpoints, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from afa.denoisers.family import COMPONENTS
from afa.errors import AfaError
from afa.merging.checkpoints import Checkpoint
from afa.merging.method import is_finite, is_kept
from afa.merging.model_kinds import is_input_layer
from afa.merging.optional import damaged_positions, is_optional, is_schedule
from afa.merging.parts import part_of
from afa.merging.recipe import MergeRecipe
from afa.merging.streams import StoredTensor, TensorSpec

_DENOISERS = (*COMPONENTS, None)
_MAX_BUFFER = 100_000  # numbers; a noise schedule has a thousand


@dataclass(frozen=True)
class PlannedTensor(TensorSpec):
    """One tensor of the result; `dtype` and `shape` are the result's.

    Attributes:
        name: by which experts are compared; a file's own name where all of them have the same.
        key: in the output file.
        sources: the experts' tensors; a single one is taken as it is. Those of the input layer may
            have fewer channels than the result, and are padded with zeros.
        base: the base's tensor, where the method needs it.
        is_merged: false where the tensor is the first expert's.
        is_autoencoder: whether it is of an autoencoder that the recipe takes from the first expert.
        is_repaired: whether it holds a text encoder's positions, which were damaged.
        is_buffer: whether it is no weight, and may hold infinity.
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
    def is_padded(self) -> bool:
        """Whether a checkpoint's tensor is padded with zeros."""
        inputs = self.sources if self.base is None else [*self.sources, self.base]
        return any(source.shape != self.shape for source in inputs)

    @property
    def num_bytes_read(self) -> int:
        """What has to be read for it."""
        inputs = self.sources if self.base is None else [*self.sources, self.base]
        return sum(source.num_bytes for source in inputs)


def plan_tensors(
    compared: Sequence[Checkpoint], recipe: MergeRecipe, *, has_base: bool
) -> tuple[list[PlannedTensor], dict[str, list[str]]]:
    """Lay out the tensors of a merge, which are those of the first expert.

    A tensor that all checkpoints have is merged. A whole part besides the denoiser, or an optional
    tensor (see `afa.merging.optional`), that some of them lack is the first expert's, or
    is left out where it lacks it itself. Anything else that is missing is refused.

    Args:
        compared: the experts, and the base at the end if there is one.
        recipe: of the merge.
        has_base: whether the last is the base.

    Returns: the tensors; and for every other expert what it has and the first one lacks.

    Raises:
        AfaError: checkpoints of several architectures.
    """
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
    """A tensor's name for methods and records: the one that everyone has, or the canonical one.

    The random masks of DARE are drawn by it; so they stay what they were for files of one layout.
    """
    if having[0].path.is_dir():
        return name
    keys = {each.keys[name] for each in having}
    return keys.pop() if len(keys) == 1 else name


def _may_lack(name: str, parts: set[str | None]) -> bool:
    """Whether a checkpoint that has these parts may lack a tensor."""
    part = part_of(name)
    return is_optional(name) or (part not in _DENOISERS and part not in parts)


def _refuse_missing(name: str, having: Checkpoint, lacking: Checkpoint) -> None:
    part = part_of(name)
    same = [n for n in having.tensors if part_of(n) == part]
    others = sum(n not in lacking.tensors for n in same) - 1
    also = f" (as are {others} more of {len(same)} like it)" if others else ""
    raise AfaError(
        "AFA-MERGE-009",
        f"Merged checkpoints must share one architecture: '{name}' has shape "
        f"{having.tensors[name].shape} in '{having.source}' and is missing in "
        f"'{lacking.source}'{also}. Merge checkpoints of one family.",
    )


def _check_shapes(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    ours = first.tensors[name].shape
    for other in checkpoints[1:]:
        theirs = other.tensors[name].shape
        if ours != theirs and not (is_input_layer(name) and _can_be_padded(theirs, ours)):
            raise AfaError(
                "AFA-MERGE-010",
                f"Merged checkpoints must share one architecture: '{name}' has shape {ours} in "
                f"'{first.source}' and {theirs} in '{other.source}'. Merge checkpoints of one "
                "family.",
            )


def _can_be_padded(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether only the second dimension, the input channels, is smaller."""
    return (
        len(shape) == len(to) == 4
        and shape[1] < to[1]
        and (shape[0], *shape[2:]) == (to[0], *to[2:])
    )


def _is_finite(tensor: StoredTensor) -> bool:
    num_numbers = torch.Size(tensor.shape).numel()
    return num_numbers > _MAX_BUFFER or is_finite(tensor.read())
