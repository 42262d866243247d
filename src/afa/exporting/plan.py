"""Plan the export of a pipeline folder and check it, before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from afa.denoisers.objective import predicted_by
from afa.errors import NO_MODEL, AfaError
from afa.exporting.original import FileTensor, denoiser_tensors, tensors_of, vae_tensors
from afa.exporting.unsaid import unsaid_of
from afa.files import Mark, parts_of, read_json, require_place_for_folder
from afa.loading.ensemble_folder import AGGREGATORS
from afa.loading.single_file.canonical_names import DENOISER
from afa.loading.single_file.conversion import converted
from afa.loading.single_file.identify import config_of
from afa.loading.single_file.layout import described_kind, layout_of
from afa.loading.sources import locate
from afa.loading.tensor_files import StoredTensor, TensorSpec
from afa.loading.trust.unchanged import marks_of
from afa.machine.damaged import is_own_bug
from afa.merging.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from afa.denoisers import PipelineKind, SingleFiles
    from afa.loading.weights import Shapes

Dtype = Literal["float32", "float16", "bfloat16"]
#: marker tensors of velocity prediction, and of a noise schedule that ends in pure noise
_VELOCITY, _ZERO_SNR = "v_pred", "ztsnr"
#: the architecture in which other programs look for the marker of velocity
_MARKED = "stable-diffusion-xl"


@dataclass(frozen=True)
class PlannedTensor(TensorSpec):
    """A tensor of the file: its dtype and shape there, and what it is made of.

    Attributes:
        made_of: how; None for a marker, which has no values.
        stored: the tensors of the folder, by the names in `made_of`.
    """

    made_of: FileTensor | None = None
    stored: Mapping[str, StoredTensor] | None = None

    def value(self) -> Tensor:
        """Read the folder's tensors, and return the values in the file's dtype."""
        stored = self.stored or {}
        if self.made_of is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return self.made_of.value(lambda name: stored[name].read()).to(self.dtype)

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the folder's tensors."""
        return sum(t.num_bytes for t in (self.stored or {}).values())


@dataclass(frozen=True)
class ExportPlan:
    """A checked export.

    Attributes:
        source: as the user names it.
        path: its folder.
        output: the new `.safetensors` file.
        dtype: of the weights; None keeps each tensor's own.
        tensors: name in the file -> tensor.
        configuration: the bundled configuration that describes the file; None if none does.
        architecture: its name in the metadata standard; None if it has none.
        predicts: what the model predicts.
        notes: messages for the user, one line each: what the file cannot say.
        marks: the folder's weight files as they were when their headers were read.
    """

    source: str
    path: Path
    output: Path
    dtype: Dtype | None
    tensors: Mapping[str, PlannedTensor]
    configuration: str | None
    architecture: str | None
    predicts: str
    notes: Sequence[str]
    marks: Mapping[Path, Mark]

    @property
    def num_bytes(self) -> int:
        """Size of the file's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def plan_export(source: str, output: str | Path, dtype: Dtype | None = None) -> ExportPlan:
    """Plan an export and check it, without reading a weight.

    Args:
        source: a pipeline folder, the hub id of one, or `zoo:animals`.
        output: a new `.safetensors` file.
        dtype: of the weights; None keeps the folder's.

    Raises:
        AfaError: if the output exists or cannot be written; the source is not a pipeline folder of
            a family that has single files; the original layout has no place for one of its tensors;
            it predicts what no file can say; or there is too little disk space.
    """
    output = Path(output).expanduser()
    if output.suffix != ".safetensors" or output.exists():
        found = "exists" if output.exists() else "does not end with .safetensors"
        raise AfaError(
            "AFA-EXPORT-001",
            f"The output '{output}' {found}. Pass a new .safetensors file as --output.",
        )
    require_place_for_folder(output.absolute().parent, "The folder of the output")
    path = locate(source)
    if path.is_file():
        raise AfaError(
            "AFA-EXPORT-002",
            f"'{source}' is a single file already; the source must be a folder. To change "
            "the precision of a file, use `afa merge` with this file alone and dtype.",
        )
    if not (path / "model_index.json").is_file() and (path / AGGREGATORS).is_file():
        raise AfaError(
            "AFA-EXPORT-003",
            f"'{source}' is an ensemble, which is several models; a single file must be one. Pass "
            "one of its experts, or a merge of them.",
        )
    checkpoint = read_checkpoint(source)
    kind = described_kind(path)
    files = layout_of(kind, source)
    marks = marks_of(checkpoint.files(vae=True))
    by_part: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        part = name.partition(".")[0]
        by_part.setdefault(part, {})[checkpoint.keys[name]] = tensor
    settings = read_json(path / "scheduler" / "scheduler_config.json")
    predicts = _require_sayable(source, kind, settings)
    tensors: dict[str, PlannedTensor] = {}
    shapes = {name: tensor.shape for name, tensor in by_part[kind.denoiser].items()}
    prefixes = {kind.denoiser: DENOISER, **files.written(shapes, by_part)}
    for part, stored in by_part.items():
        planned = _planned_part(source, path, part, stored, kind, prefixes)
        for each in planned:
            used = {name: stored[name] for name in each.sources}
            shape = each.shape({name: tensor.shape for name, tensor in used.items()})
            own = next(iter(used.values())).dtype
            chosen = getattr(torch, dtype) if dtype and own.is_floating_point else own
            tensors[prefixes[part] + each.name] = PlannedTensor(chosen, shape, each, used)
    for marker in _markers(predicts, settings):
        tensors[marker] = PlannedTensor(torch.float32, (0,))
    configuration = _configuration({n: t.shape for n, t in tensors.items()}, source, predicts)
    plan = ExportPlan(
        source=source,
        path=path,
        output=output,
        dtype=dtype,
        tensors=tensors,
        configuration=configuration,
        architecture=files.architectures.get(configuration or ""),
        predicts=predicts,
        notes=_notes(source, path, by_part, files, configuration, predicts),
        marks=marks,
    )
    _check_space(plan)
    return plan


def _require_sayable(source: str, kind: PipelineKind, settings: dict[str, Any]) -> str:
    """Return what a folder's model predicts.

    Raises:
        AfaError: if a single file cannot say it.
    """
    class_name = str(settings.get("_class_name"))
    predicts, said = predicted_by(class_name, settings), None
    if class_name.startswith("EDM"):
        said = f"{predicts} on continuous noise levels (EDM)"
    elif predicts not in ("epsilon", "v_prediction", "flow_prediction"):
        said = predicts
    elif predicts == "epsilon" and settings.get("rescale_betas_zero_snr"):
        said = "epsilon with zero terminal SNR"
    if said is not None:
        raise AfaError(
            "AFA-EXPORT-004",
            f"'{source}' predicts {said}, which a single file of {kind.name} cannot say, so other "
            "programs would draw noise with it. Use the folder.",
        )
    return predicts


def _planned_part(
    source: str,
    path: Path,
    part: str,
    stored: Mapping[str, StoredTensor],
    kind: PipelineKind,
    prefixes: Mapping[str, str],
) -> list[FileTensor]:
    """Plan one part, and check that diffusers' own conversion brings every tensor back.

    Raises:
        AfaError: if it does not.
    """
    files = layout_of(kind, source)
    if part not in prefixes:
        unused = sorted(stored)
        raise AfaError(
            "AFA-EXPORT-005",
            f"'{source}' has a {part} ('{unused[0]}', ...), for which single files of {kind.name} "
            "have no place. Use the folder.",
        )
    if part == kind.denoiser:
        planned = denoiser_tensors(stored, kind.family, files.renamed)
    elif part == "vae":
        planned = vae_tensors(stored)
    else:
        planned = list(tensors_of(stored, prefixes[part]))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    lost = not_brought_back(part, planned, shapes, path)
    if lost:
        raise AfaError(
            "AFA-EXPORT-006",
            f"The original layout of {kind.name} has no place for '{lost[0]}' in the {part} of "
            f"'{source}' ({len(lost)} tensors). Use the folder.",
        )
    return planned


def not_brought_back(
    part: str, planned: Sequence[FileTensor], shapes: Shapes, config: Path
) -> list[str]:
    """List the tensors that diffusers' conversion does not restore from the planned ones.

    Instead of weights, the conversion gets distinct numbers, one per row, since it only renames,
    splits and reorders rows.
    """
    numbered, start = {}, 0
    for name, shape in shapes.items():
        small = shape if "text_projection" in name else (*shape[:1], *(1 for _ in shape[1:]))
        count = torch.Size(small).numel()
        numbered[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(small)
        start += count
    given = {each.name: each.value(numbered.__getitem__) for each in planned}
    try:
        back = converted(part, given, config)
    except NO_MODEL as error:
        if isinstance(error, AfaError) or is_own_bug(error):
            raise
        return sorted(shapes)
    by_name = {_bare(name): tensor for name, tensor in back.items()}
    return [
        name
        for name, tensor in numbered.items()
        if not name.endswith("position_ids") and not _equal(by_name.get(_bare(name)), tensor)
    ]


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _equal(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found.double(), expected)


def _markers(predicts: str, settings: dict[str, Any]) -> list[str]:
    if predicts != "v_prediction":
        return []
    return [_VELOCITY, *([_ZERO_SNR] if settings.get("rescale_betas_zero_snr") else [])]


def _configuration(shapes: Shapes, source: str, predicts: str) -> str | None:
    """The bundled configuration by which the file will be read; None if there is none."""
    try:
        return str(config_of(shapes, source, predicts))
    except AfaError:
        return None


def _notes(
    source: str,
    path: Path,
    by_part: Mapping[str, object],
    files: SingleFiles,
    configuration: str | None,
    predicts: str,
) -> list[str]:
    notes = []
    named = parts_of(read_json(path / "model_index.json"))
    lacking = [part for part in files.parts if part not in by_part and part in named]
    if lacking:
        notes.append(f"'{source}' has no weights of {', '.join(lacking)}, so the file lacks them")
    # the scheduler and tokenizers are compared, and what prepares pictures has no weights
    known = (*by_part, *lacking, "scheduler", "feature_extractor")
    left = [n for n in named if n not in known and not n.startswith("tokenizer")]
    if left:
        notes.append(f"not in the file: {', '.join(left)}")
    if predicts == "v_prediction" and not (configuration or "").startswith(_MARKED):
        notes.append(
            "it predicts velocity, which afa reads from the file; most programs look for that mark "
            "in Stable Diffusion XL alone and have to be told (in ComfyUI: ModelSamplingDiscrete)"
        )
    if configuration is None:
        notes.append(
            "no published model has this architecture: programs that know only those cannot load "
            f"the file; afa and diffusers can with config={path}"
        )
        return notes
    return [*notes, *unsaid_of(path, configuration)]


def _check_space(plan: ExportPlan) -> None:
    folder = next(parent for parent in plan.output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if plan.num_bytes > free:
        raise AfaError(
            "AFA-EXPORT-007",
            f"The export needs {plan.num_bytes / 1e9:.2f} GB of disk space; '{folder}' has "
            f"{free / 1e9:.2f} GB free. Free some, or pass another --output.",
        )
