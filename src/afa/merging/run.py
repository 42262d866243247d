"""Run a merge and write its output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.errors import AfaError
from afa.files import staged, write_atomic
from afa.loading.expert_source import ExpertSource
from afa.loading.sources import refer
from afa.loading.tensor_files import StoredTensor, write_tensors, writing_order
from afa.loading.weights import hash_files
from afa.merging.compared import PlannedTensor
from afa.merging.folders import copy_files
from afa.merging.metadata import carried_metadata
from afa.merging.method import is_finite
from afa.merging.optional import right_positions
from afa.merging.plan import SINGLE_FILE, MergePlan, plan_merge
from afa.provenance import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from afa.merging.checkpoints import Checkpoint
    from afa.merging.recipe import MergeRecipe

#: the record of a merged folder; a single file has it as metadata `afa_merge`
RECORD = "merge.json"


@dataclass(frozen=True)
class MergeProgress:
    """Progress of a merge.

    Attributes:
        stage: `hash` while the inputs are hashed, then `merge`.
        num_bytes: bytes read in this stage.
        total_bytes: bytes to read in this stage.
        num_tensors: tensors written.
        total_tensors: tensors to write.
    """

    stage: Literal["hash", "merge"]
    num_bytes: int
    total_bytes: int
    num_tensors: int
    total_tensors: int


def merge_checkpoints(recipe: MergeRecipe, output: str | Path) -> Iterator[MergeProgress]:
    """Merge checkpoints into a new one, with one tensor of each in memory.

    The output is renamed into place at the end, so that an interrupted merge leaves no files.

    Args:
        recipe: the merge.
        output: see `plan_merge`.

    Yields: progress, after every hashed input and every tensor.

    Raises:
        AfaError: as `plan_merge`, and if an input or the result has non-finite values.
    """
    yield from run_merge(plan_merge(recipe, output))


def run_merge(plan: MergePlan) -> Iterator[MergeProgress]:
    """Run a planned merge; see `merge_checkpoints`."""
    tensors = plan.tensors
    inputs = _inputs(plan)
    sizes = [sum(file.stat().st_size for file in files) for _, files in inputs]
    hashes: list[str] = []
    for checkpoint, files in inputs:
        hashes.append(hash_files(checkpoint.path, files))
        done = sum(sizes[: len(hashes)])
        yield MergeProgress("hash", done, sum(sizes), 0, len(tensors))
    record = json.dumps(_record(plan, hashes), indent=2)

    total = sum(tensor.num_bytes_read for tensor in tensors)
    num_bytes = num_tensors = 0
    with staged(plan.output) as partial:
        if SINGLE_FILE not in plan.files:
            partial.mkdir()
        for relative, planned in plan.files.items():
            file = partial / relative if relative else partial
            file.parent.mkdir(exist_ok=True)
            metadata = {"format": "pt"}
            if not relative:
                metadata |= carried_metadata(plan) | {"afa_merge": record}
            by_key = {tensor.key: tensor for tensor in planned}
            values = (_value(plan, by_key[key]) for key in writing_order(by_key))
            for key in write_tensors(file, by_key, values, metadata):
                num_bytes += by_key[key].num_bytes_read
                num_tensors += 1
                yield MergeProgress("merge", num_bytes, total, num_tensors, len(tensors))
        if SINGLE_FILE not in plan.files:
            parts = [str(Path(file).parent) for file in plan.files]
            first, dtype = plan.experts[0].path, plan.recipe.dtype
            copy_files(first, list(plan.copies), partial, parts, dtype)
            write_atomic(partial / RECORD, f"{record}\n")


def _value(plan: MergePlan, tensor: PlannedTensor) -> Tensor:
    """Compute one tensor of the result.

    Raises:
        AfaError: if it, or one of its inputs, has non-finite values.
    """
    if tensor.is_repaired:
        return right_positions(tensor.shape)
    if not tensor.is_merged:
        value = tensor.sources[0].read()
        if not value.is_floating_point():
            return value
        if tensor.is_buffer:
            return value.to(tensor.dtype)
        _check_input(value.float(), tensor.name, tensor.sources[0])
        merged = value
    else:
        values = [_read_finite(source, tensor) for source in tensor.sources]
        base = None if tensor.base is None else _read_finite(tensor.base, tensor)
        merged = plan.method.merge(tensor.name, values, base)
    result = merged.to(tensor.dtype)
    if not is_finite(result) or _is_clipped(merged, tensor.dtype):
        raise AfaError(
            "AFA-MERGE-035",
            f"The merged tensor '{tensor.name}' reaches {merged.float().abs().max().item():.4g}, "
            f"which overflows {tensor.dtype}. Set dtype: float32, or use smaller merge weights.",
        )
    return result


def _is_clipped(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether values overflow an 8-bit dtype, which torch clips to its largest value."""
    if dtype.itemsize > 1 or value.numel() == 0:
        return False
    return bool(value.float().abs().max() > torch.finfo(dtype).max)


def _read_finite(source: StoredTensor, tensor: PlannedTensor) -> Tensor:
    """Read a source in float32, with zeros for missing input channels."""
    value = source.read().float()
    _check_input(value, tensor.name, source)
    if value.shape == tensor.shape:
        return value
    padded = value.new_zeros(tensor.shape)
    padded[:, : value.shape[1]] = value
    return padded


def _check_input(value: Tensor, name: str, source: StoredTensor) -> None:
    if not is_finite(value):
        raise AfaError(
            "AFA-MERGE-036",
            f"'{name}' in '{source.file}' has non-finite values (NaN or infinity). Download the "
            "file again, or remove it from experts.",
        )


def _inputs(plan: MergePlan) -> list[tuple[Checkpoint, list[Path]]]:
    """The files to hash: of the experts, the base, and a folder's copied autoencoder."""
    vae = plan.recipe.vae == "merge"
    inputs = [(checkpoint, checkpoint.files(vae=vae)) for checkpoint in plan.checkpoints]
    first = plan.experts[0]
    copied = sorted(set(first.files(vae=True)) - set(first.files(vae=vae)))
    return [*inputs, (first, copied)] if copied else inputs


def _record(plan: MergePlan, hashes: list[str]) -> dict[str, Any]:
    """The record of a merge."""
    found = (
        refer(ExpertSource(checkpoint.source), checkpoint.path, sha256)
        for (checkpoint, _), sha256 in zip(_inputs(plan), hashes, strict=True)
    )
    references = [{k: v for k, v in asdict(reference).items() if v} for reference in found]
    record = {
        "afa_version": __version__,
        **plan.recipe.model_dump(exclude_none=True, exclude={"experts", "base", "vae"}),
        "experts": references[: len(plan.experts)],
        "vae": plan.recipe.vae,
        "unknown_tensors": list(plan.unknown),
        "kept_tensors": list(plan.kept),
        "left_out_tensors": {source: list(names) for source, names in plan.left_out.items()},
        "repaired_tensors": [t.name for t in plan.tensors if t.is_repaired],
        "padded_tensors": [t.name for t in plan.tensors if t.is_padded],
    }
    others = references[len(plan.experts) :]
    if plan.base is not None:
        record["base"] = others.pop(0)
    if others:
        record["vae"] = others.pop(0)
    return record
