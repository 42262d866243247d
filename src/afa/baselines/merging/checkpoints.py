"""Checkpoints to merge: what tensors they have and where, without reading any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.baselines.merging.parts import TEXT_ENCODERS
from afa.baselines.merging.streams import StoredTensor, read_header
from afa.errors import AfaError
from afa.files import read_json
from afa.kinds import kind_of
from afa.sources import locate
from afa.weights import is_quantised, weight_files, weights_in

_PARTS = ("unet", "transformer", *TEXT_ENCODERS, "vae")
# what of a hub repository is needed; never a pickle
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
        source: as it was named.
        path: where it is.
        tensors: name -> tensor; a folder's names start with their part, `unet.conv_in.weight`.
        keys: name -> the tensor's name in its own file.
    """

    source: str
    path: Path
    tensors: Mapping[str, StoredTensor]
    keys: Mapping[str, str]

    def files(self, *, vae: bool) -> list[Path]:
        """The files that the tensors lie in, those of a folder's autoencoder only if asked for."""
        names = [name for name in self.tensors if vae or not name.startswith("vae.")]
        return sorted({self.tensors[name].file for name in names})


def read_checkpoint(source: str) -> Checkpoint:
    """Find a checkpoint and read the headers of its files.

    Raises:
        AfaError: nothing is there, a pickle, something damaged, or a family that is not supported.
    """
    path = locate(source, files=_FILES)
    if path.is_file():
        tensors = read_header(path)
        _refuse_quantised(tensors)
        return Checkpoint(source, path, tensors, {name: name for name in tensors})
    if (path / "model_index.json").is_file():
        kind_of(str(_index(path).get("_class_name")), source)
    weight_files(path)  # refuses what is no pipeline
    index = _index(path)
    tensors, keys = {}, {}
    for part in _PARTS:
        if not has_part(index, part):
            continue
        for file in weights_in(path / part)[1]:
            for key, tensor in read_header(file).items():
                name = canonical_name(part, key)
                if name in tensors:
                    raise AfaError(
                        f"A folder must hold every tensor once; '{key}' is in "
                        f"'{tensors[name].file}' and in '{file}'. Remove one of them."
                    )
                tensors[name], keys[name] = tensor, key
    _refuse_quantised(tensors)
    return Checkpoint(source, path, tensors, keys)


def canonical_name(part: str, key: str) -> str:
    """The name of a folder's tensor by which experts are compared.

    transformers 5 saves text encoders without the `text_model.` that older versions wrote.
    """
    return f"{part}.{key.removeprefix('text_model.') if part in TEXT_ENCODERS else key}"


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether a `model_index.json` names a component, and not only its empty place.

    A name is no path: `../x` would be copied from and to outside the folders.
    """
    entry = index.get(part)
    return isinstance(entry, list) and entry[:1] not in ([], [None]) and part.isidentifier()


def prediction_type(checkpoint: Checkpoint) -> str | None:
    """What a folder's U-Net predicts; None for a single file, which does not say."""
    file = checkpoint.path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    return str(read_json(file).get("prediction_type") or "epsilon")


def _index(path: Path) -> dict[str, Any]:
    return read_json(path / "model_index.json")


def _refuse_quantised(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights whose numbers mean nothing without a scale.

    Raises:
        AfaError: names the first.
    """
    for name, tensor in tensors.items():
        if is_quantised(name, is_float=tensor.dtype.is_floating_point):
            raise AfaError(
                f"Merged weights must be plain numbers; '{name}' in '{tensor.file}' is quantised "
                f"({tensor.dtype}). Take the float16 or float32 version."
            )
