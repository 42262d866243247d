"""Plan a merge and check it, before any tensor is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from afa.errors import AfaError
from afa.files import require_place_for_folder
from afa.merging.checkpoints import Checkpoint, in_one_layout, read_checkpoint
from afa.merging.compared import PlannedTensor, plan_tensors
from afa.merging.folders import files_to_copy, weights_file
from afa.merging.method import MergeMethod
from afa.merging.model_kinds import check_channels, refuse_mixed_kinds
from afa.merging.objectives import check_objectives
from afa.merging.parts import block_keys, part_of
from afa.merging.recipe import MergeRecipe

# key of `MergePlan.files` if the output is a single file
SINGLE_FILE = ""


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    Attributes:
        recipe: the recipe.
        method: the merge method, adapted to these checkpoints.
        output: a new folder, or a new `.safetensors` file.
        experts: in the recipe's order.
        base: the model that they were fine-tuned from, if the method needs it.
        files: output file, relative to a folder's root -> its tensors.
        copies: files to copy from the first expert's folder, relative to it.
        unknown: tensors of no known component or site; they are merged like the others.
        kept: tensors copied from the first expert, except a copied autoencoder: those that another
            checkpoint lacks, and buffers such as positions.
        left_out: source -> tensors of other experts that the first one, and so the result, lacks.
        predicts: the prediction type, if a checkpoint specifies it.
        num_bytes: size of the output.
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
    left_out: Mapping[str, Sequence[str]]
    predicts: str | None
    num_bytes: int

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The experts, followed by the base if there is one."""
        return [*self.experts, *([] if self.base is None else [self.base])]

    @property
    def tensors(self) -> list[PlannedTensor]:
        """The tensors of all files."""
        return [tensor for tensors in self.files.values() for tensor in tensors]


def plan_merge(recipe: MergeRecipe, output: str | Path) -> MergePlan:
    """Plan a merge and check it, without reading a tensor.

    Args:
        recipe: the merge; its paths are relative to the working directory.
        output: a new `.safetensors` file for files as experts, a new folder for folders.

    Raises:
        AfaError: if the output exists or cannot be written; a checkpoint cannot be read or is not
            a complete model; layouts, kinds, prediction types, noise schedules or architectures
            differ; the settings do not fit the checkpoints; or there is too little disk space.
    """
    output = Path(output).expanduser()
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if output.exists() and (output.suffix == ".safetensors" or not is_empty_folder):
        raise AfaError(
            "AFA-MERGE-026", f"The output '{output}' exists. Pass a new path as --output."
        )
    require_place_for_folder(output.absolute().parent, "The folder of the output")
    experts = [read_checkpoint(source) for source in recipe.experts]
    base = None if recipe.base is None else read_checkpoint(recipe.base)
    compared = experts if base is None else [*experts, base]
    _check_layouts(compared, output)
    refuse_mixed_kinds(compared)
    predicts = check_objectives(compared)
    compared = in_one_layout(compared)
    check_channels(compared)
    tensors, left_out = plan_tensors(compared, recipe)
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
        unknown=[t.name for t in tensors if t.is_merged and t.name not in known],
        kept=[t.name for t in tensors if not (t.is_merged or t.is_autoencoder)],
        left_out=left_out,
        predicts=predicts,
        num_bytes=num_bytes,
    )


def _check_layouts(checkpoints: Sequence[Checkpoint], output: Path) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.path.is_file() != first.path.is_file():
            file, folder = (first, other) if first.path.is_file() else (other, first)
            raise AfaError(
                "AFA-MERGE-027",
                f"'{file.source}' is a single file, '{folder.source}' a folder. Merged checkpoints "
                "must have one layout. Load the file with diffusers' from_single_file and save it "
                "with save_pretrained.",
            )
    if first.path.is_file() != (output.suffix == ".safetensors"):
        kind = "a .safetensors file" if first.path.is_file() else "a folder"
        raise AfaError(
            "AFA-MERGE-028",
            f"The output '{output}' must be {kind}, like the experts. Pass {kind} as --output.",
        )


def _check_space(output: Path, num_bytes: int) -> None:
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise AfaError(
            "AFA-MERGE-029",
            f"The merge needs {num_bytes / 1e9:.2f} GB of disk space; '{folder}' has "
            f"{free / 1e9:.2f} GB free. Free some, or pass another --output.",
        )
