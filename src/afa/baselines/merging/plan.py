"""Everything about a merge that can be known before it starts, and every refusal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from afa.baselines.merging.checkpoints import Checkpoint, prediction_type, read_checkpoint
from afa.baselines.merging.folders import files_to_copy, weights_file
from afa.baselines.merging.method import MergeMethod, is_kept
from afa.baselines.merging.parts import block_keys, part_of
from afa.baselines.merging.recipe import MergeRecipe
from afa.baselines.merging.streams import StoredTensor, TensorSpec
from afa.errors import AfaError

# the whole output, where it is one file
SINGLE_FILE = ""


@dataclass(frozen=True)
class PlannedTensor(TensorSpec):
    """One tensor of the result; `dtype` and `shape` are the result's.

    Attributes:
        name: by which experts are compared.
        key: in the output file.
        sources: the experts' tensors; a single one is taken as it is.
        base: the base's tensor, where the method needs it.
        is_merged: false where the tensor is one expert's.
    """

    name: str
    key: str
    sources: Sequence[StoredTensor]
    base: StoredTensor | None
    is_merged: bool

    @property
    def num_bytes_read(self) -> int:
        """What has to be read for it."""
        inputs = self.sources if self.base is None else [*self.sources, self.base]
        return sum(source.num_bytes for source in inputs)


@dataclass(frozen=True)
class MergePlan:
    """A merge that nothing is known to stand in the way of.

    Attributes:
        recipe: what was asked for.
        method: fitted to these checkpoints.
        output: a new folder, or a new `.safetensors` file.
        experts: in the recipe's order.
        base: what they were fine-tuned from, where the method needs it.
        files: output file, relative to a folder's root -> its tensors.
        copies: files that come from the first expert's folder, relative to it.
        unknown: tensors that fit no known part or site; they are merged like the others.
        kept: tensors that some checkpoints lack, taken from the first expert that has them.
        num_bytes: of everything that will be written.
    """

    recipe: MergeRecipe
    method: MergeMethod
    output: Path
    experts: Sequence[Checkpoint]
    base: Checkpoint | None
    files: Mapping[str, Sequence[PlannedTensor]]
    copies: Sequence[Path]
    unknown: Sequence[str]
    kept: Sequence[str]
    num_bytes: int

    @property
    def tensors(self) -> list[PlannedTensor]:
        """Of all files."""
        return [tensor for tensors in self.files.values() for tensor in tensors]


def plan_merge(recipe: MergeRecipe, output: str | Path) -> MergePlan:
    """Check a merge as far as that goes without reading a tensor.

    Args:
        recipe: what to merge; paths in it are relative to where the program runs.
        output: ends in `.safetensors` for single files, and is a new folder for folders.

    Raises:
        AfaError: an output that exists; checkpoints that cannot be read, or of several layouts,
            objectives or architectures; settings that do not fit; too little space.
    """
    output = Path(output).expanduser()
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if output.exists() and (output.suffix == ".safetensors" or not is_empty_folder):
        raise AfaError(f"The output must be new; '{output}' exists. Name another one.")
    experts = [read_checkpoint(source) for source in recipe.experts]
    base = None if recipe.base is None else read_checkpoint(recipe.base)
    compared = experts if base is None else [*experts, base]
    _check_layouts(compared, output)
    _check_objectives(compared)
    tensors = _plan_tensors(recipe, experts, base)
    names = [tensor.name for tensor in tensors]
    files: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        part = part_of(tensor.name) if experts[0].path.is_dir() else None
        files.setdefault(weights_file(part) if part else SINGLE_FILE, []).append(tensor)
    copies: list[Path] = []
    if experts[0].path.is_dir():
        copies = files_to_copy(experts[0].path, {str(Path(file).parent) for file in files})
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    num_bytes += sum((experts[0].path / file).stat().st_size for file in copies)
    _check_space(output, num_bytes)
    known = block_keys(names)
    return MergePlan(
        recipe=recipe,
        method=recipe.build().fit(names, len(experts)),
        output=output,
        experts=experts,
        base=base,
        files=files,
        copies=copies,
        unknown=[name for name in names if name not in known],
        kept=[
            name
            for name in names
            if not _is_first_only(recipe, name) and any(name not in c.tensors for c in compared)
        ],
        num_bytes=num_bytes,
    )


def _plan_tensors(
    recipe: MergeRecipe, experts: Sequence[Checkpoint], base: Checkpoint | None
) -> list[PlannedTensor]:
    planned = []
    compared = experts if base is None else [*experts, base]
    for name in dict.fromkeys(name for checkpoint in compared for name in checkpoint.tensors):
        having = [checkpoint for checkpoint in compared if name in checkpoint.tensors]
        is_optional = name.startswith("model_ema.") or name.endswith("position_ids")
        if having[0] is base and (is_optional or _is_first_only(recipe, name)):
            continue
        if _is_first_only(recipe, name):
            if having[0] is not experts[0]:
                continue
            is_merged = False
        else:
            if len(having) < len(compared) and not is_optional:
                lacking = next(c for c in compared if name not in c.tensors)
                raise AfaError(
                    f"Merged checkpoints must share one architecture: '{name}' has shape "
                    f"{having[0].tensors[name].shape} in '{having[0].source}' and is missing in "
                    f"'{lacking.source}'. Merge checkpoints of one family."
                )
            is_merged = len(having) == len(compared)
        first = having[0].tensors[name]
        is_merged = is_merged and not is_kept(name, first.dtype)
        if is_merged:
            _check_shapes(name, having)
        dtype = first.dtype
        if recipe.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, recipe.dtype)
        planned.append(
            PlannedTensor(
                dtype=dtype,
                shape=first.shape,
                name=name,
                key=having[0].keys[name],
                sources=[c.tensors[name] for c in experts] if is_merged else [first],
                base=base.tensors[name] if is_merged and base is not None else None,
                is_merged=is_merged,
            )
        )
    return planned


def _is_first_only(recipe: MergeRecipe, name: str) -> bool:
    """Whether a tensor is of an autoencoder that is taken from the first expert."""
    return recipe.vae == "first" and part_of(name) == "vae"


def _check_shapes(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        ours, theirs = first.tensors[name].shape, other.tensors[name].shape
        if ours != theirs:
            raise AfaError(
                f"Merged checkpoints must share one architecture: '{name}' has shape {ours} in "
                f"'{first.source}' and {theirs} in '{other.source}'. Merge checkpoints of one "
                "family."
            )


def _check_layouts(checkpoints: Sequence[Checkpoint], output: Path) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.path.is_file() != first.path.is_file():
            file, folder = (first, other) if first.path.is_file() else (other, first)
            raise AfaError(
                f"Merged checkpoints must have one layout: '{file.source}' is a single file, "
                f"'{folder.source}' a folder. Load the file with diffusers' from_single_file and "
                "save it with save_pretrained."
            )
    if first.path.is_file() != (output.suffix == ".safetensors"):
        made = "a .safetensors file" if first.path.is_file() else "a folder"
        raise AfaError(
            f"A merge has its experts' layout, which makes {made}; the output is '{output}'. Name "
            f"{made}."
        )


def _check_objectives(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = [(c.source, prediction_type(c)) for c in checkpoints]
    for source, kind in others:
        if kind != first[1]:
            raise AfaError(
                f"Merged checkpoints must share one objective: '{first[0]}' has prediction_type = "
                f"{first[1]}, '{source}' has {kind}. Their mean would predict neither."
            )


def _check_space(output: Path, num_bytes: int) -> None:
    place = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise AfaError(
            f"The merge takes {num_bytes / 1e9:.2f} GB; '{place}' has {free / 1e9:.2f} GB free. "
            "Make room, or name another place."
        )
