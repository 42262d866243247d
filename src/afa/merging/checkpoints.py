"""Read which tensors checkpoints contain, from the headers of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from afa.denoisers.family import COMPONENTS
from afa.denoisers.kinds import kind_of
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.single_file.canonical_names import DENOISER, canonical_names, unet_names
from afa.loading.sources import locate
from afa.loading.tensor_files import StoredTensor, read_header
from afa.loading.weights import file_metadata, weight_files, weights_in
from afa.merging.parts import TEXT_ENCODERS
from afa.merging.quantised import refuse_quantised
from afa.merging.whole_models import refuse_other_data, refuse_parts

_PARTS = (*COMPONENTS, *TEXT_ENCODERS, "vae")
# files that a merge downloads from a hub repository; pickles are never among them
_FILES = (
    "model_index.json",
    *(f"{part}/*.json" for part in (*_PARTS, "scheduler", "feature_extractor")),
    *(f"{part}/*.safetensors" for part in _PARTS),
    *(
        f"tokenizer{number}/*.{kind}"
        for number in ("", "_2", "_3")
        for kind in ("json", "txt", "model")
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder or a single file.

    Attributes:
        source: as the recipe names it.
        path: its folder or file.
        tensors: canonical name -> tensor; a folder's names start with their component,
            `unet.conv_in.weight`.
        keys: canonical name -> the tensor's name in its own file.
        metadata: metadata of a single file.
    """

    source: str
    path: Path
    tensors: Mapping[str, StoredTensor]
    keys: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def files(self, *, vae: bool) -> list[Path]:
        """The files with the tensors; `vae` includes those of a folder's autoencoder."""
        names = [name for name in self.tensors if vae or not name.startswith("vae.")]
        return sorted({self.tensors[name].file for name in names})


def read_checkpoint(source: str) -> Checkpoint:
    """Find a checkpoint and read the headers of its files.

    Raises:
        AfaError: if the checkpoint does not exist, is a pickle, is damaged, has quantised weights,
            is of an unsupported family, or is not a complete model (a LoRA, an autoencoder, ...).
    """
    path = locate(source, files=_FILES)
    if path.is_file():
        return _read_file(source, path)
    if (path / "model_index.json").is_file():
        kind_of(str(read_json(path / "model_index.json").get("_class_name")), source)
    weight_files(path)  # raises if this is not a pipeline
    components = parts_of(read_json(path / "model_index.json"))
    tensors: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    for part in [part for part in _PARTS if part in components]:
        for file in weights_in(path / part)[1]:
            for key, tensor in read_header(file).items():
                name = canonical_name(part, key)
                if name in tensors:
                    raise AfaError(
                        "AFA-MERGE-006",
                        f"Duplicate tensor: '{key}' is in '{tensors[name].file}' and in "
                        f"'{file}'. Remove one of the files.",
                    )
                tensors[name], keys[name] = tensor, key
    refuse_quantised(tensors, {}, source)
    return Checkpoint(source, path, tensors, keys)


def _read_file(source: str, path: Path) -> Checkpoint:
    stored, metadata = read_header(path), file_metadata(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    refuse_parts(shapes, source)
    refuse_quantised(stored, metadata, source)
    refuse_other_data(shapes, source)
    keys: dict[str, str] = {}
    for key, name in canonical_names(stored).items():
        if name in keys:
            raise AfaError(
                "AFA-MERGE-007",
                f"'{source}' contains one tensor under two names, '{keys[name]}' and '{key}', "
                "which happens if a tool merged files of two layouts. Use another copy, or remove "
                "one layout's tensors from the file.",
            )
        keys[name] = key
    return Checkpoint(source, path, {n: stored[key] for n, key in keys.items()}, keys, metadata)


def in_one_layout(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Rename the U-Nets of single files to diffusers' names if some files use these.

    Raises:
        AfaError: if transformers have two layouts, which differ in more than names.
    """
    has_original = [_has(c, DENOISER) for c in checkpoints]
    for part in ("transformer.", "unet."):
        if not any(has_original) or not any(_has(c, part) for c in checkpoints):
            continue
        if part == "transformer.":
            diffusers = next(c for c in checkpoints if _has(c, part))
            original = next(c for c in checkpoints if _has(c, DENOISER))
            raise AfaError(
                "AFA-MERGE-008",
                f"'{diffusers.source}' has diffusers' layout, '{original.source}' the original "
                "one, which joins queries, keys and values. Transformers must have one layout. "
                "Convert one of them.",
            )
        return [
            _renamed(c) if is_original else c
            for c, is_original in zip(checkpoints, has_original, strict=True)
        ]
    return list(checkpoints)


def _has(checkpoint: Checkpoint, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in checkpoint.tensors)


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with diffusers' names for its U-Net."""
    new = unet_names(checkpoint.tensors)
    return replace(
        checkpoint,
        tensors={new.get(name, name): tensor for name, tensor in checkpoint.tensors.items()},
        keys={new.get(name, name): key for name, key in checkpoint.keys.items()},
    )


def canonical_name(part: str, key: str) -> str:
    """The name of a folder's tensor, equal in all experts.

    Removes the prefix `text_model.` of text encoders, which transformers 5 no longer writes.
    """
    return f"{part}.{key.removeprefix('text_model.') if part in TEXT_ENCODERS else key}"
