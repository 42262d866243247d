"""Write a planned export, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch

from afa.errors import AfaError
from afa.exporting.plan import ExportPlan, plan_export
from afa.files import mark_of, read_json, staged
from afa.loading.expert_source import ExpertSource
from afa.loading.sources import refer
from afa.loading.student_record import ENTRY, student_record
from afa.loading.tensor_files import header_of, write_tensors, writing_order
from afa.loading.weights import hash_pipeline
from afa.merging.metadata import prediction_entry
from afa.merging.method import is_finite
from afa.merging.run import RECORD
from afa.provenance import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from afa.exporting.plan import Dtype
    from afa.files import Mark

_HASH = "modelspec.hash_sha256"


@dataclass(frozen=True)
class ExportProgress:
    """Progress of an export.

    Attributes:
        stage: `hash` while the folder is hashed, then `export`.
        num_bytes: bytes read in this stage.
        total_bytes: bytes to read in this stage.
        num_tensors: tensors written.
        total_tensors: tensors to write.
    """

    stage: Literal["hash", "export"]
    num_bytes: int
    total_bytes: int
    num_tensors: int
    total_tensors: int


def export_checkpoint(
    source: str, output: str | Path, dtype: Dtype | None = None
) -> Iterator[ExportProgress]:
    """Write a pipeline folder as a single file in the layout of the original code.

    The file is what ComfyUI, the web UIs, diffusers' `from_single_file` and afa load. It holds
    denoiser, text encoders and autoencoder, and metadata by the standard of
    https://github.com/Stability-AI/ModelSpec. It is renamed into place at the end.

    Args:
        source: see `plan_export`.
        output: a new `.safetensors` file.
        dtype: of the weights; None keeps the folder's.

    Yields: progress, before and after hashing, and after every tensor.

    Raises:
        AfaError: as `plan_export`, and if a value is not finite in the file's dtype.
    """
    yield from run_export(plan_export(source, output, dtype))


def run_export(plan: ExportPlan) -> Iterator[ExportProgress]:
    """Run a planned export; see `export_checkpoint`."""
    total = sum(tensor.num_bytes_read for tensor in plan.tensors.values())
    count = len(plan.tensors)
    yield ExportProgress("hash", 0, total, 0, count)
    metadata, digest = _metadata(plan), hashlib.sha256()
    yield ExportProgress("hash", total, total, 0, count)

    def values() -> Iterator[Tensor]:
        for name in writing_order(plan.tensors):
            value = _finite(plan, name).contiguous()
            if value.numel():
                digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
            yield value

    with staged(plan.output) as partial:
        num_bytes = 0
        # the hash of all values is known at the end, and as long as the one that is written first
        metadata[_HASH] = f"0x{'0' * 64}"
        written = write_tensors(partial, plan.tensors, values(), metadata)
        for number, name in enumerate(written, start=1):
            num_bytes += plan.tensors[name].num_bytes_read
            yield ExportProgress("export", num_bytes, total, number, count)
        _require_unchanged(plan.marks)
        metadata[_HASH] = f"0x{digest.hexdigest()}"
        with partial.open("r+b") as stream:
            stream.write(header_of(plan.tensors, metadata))


def _require_unchanged(marks: Mapping[Path, Mark]) -> None:
    """Check that no file was written or replaced since its mark was taken.

    Raises:
        AfaError: if one was.
    """
    for file, before in marks.items():
        # ctime alone may change without a write, such as by a new hard link
        if (mark_of(file) or ())[:4] != before[:4]:
            raise AfaError(
                "AFA-EXPORT-009",
                f"'{file}' changed while it was exported; nothing was written. Run the command "
                "again when nothing else writes into that folder.",
            )


def _finite(plan: ExportPlan, name: str) -> Tensor:
    """Compute one tensor of the file.

    Raises:
        AfaError: if it has values that are not finite.
    """
    value = plan.tensors[name].value()
    if value.is_floating_point() and not is_finite(value):
        raise AfaError(
            "AFA-EXPORT-008",
            f"'{name}' would have values that are not finite in {value.dtype}. Pass --dtype "
            f"float32 or bfloat16; if that does not help, '{plan.source}' has them itself.",
        )
    return value


def _metadata(plan: ExportPlan) -> dict[str, str]:
    """Return the metadata of the file."""
    reference = refer(ExpertSource(plan.source), plan.path, hash_pipeline(plan.path))
    record = {
        "afa_version": __version__,
        "source": {key: value for key, value in asdict(reference).items() if value},
        "dtype": plan.dtype or "as in the source",
    }
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": plan.output.stem,
        "afa_export": json.dumps(record, indent=2),
    }
    if plan.architecture is not None:
        metadata["modelspec.architecture"] = plan.architecture
    metadata |= prediction_entry(plan.predicts)
    merged, distilled = plan.path / RECORD, student_record(plan.path)
    if merged.is_file():
        metadata["afa_merge"] = json.dumps(read_json(merged), indent=2)
    if distilled is not None:
        metadata[ENTRY] = json.dumps(distilled, indent=2)
    return metadata
