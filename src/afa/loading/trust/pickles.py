"""Convert pickled checkpoints, if allowed, to safetensors without running code in them.

The safetensors file is stored in the user's cache, and all other modules read that.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, staged
from afa.machine.damaged import loading, said_by
from afa.machine.hashes import hash_file
from afa.policy import policy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})

_MAX_NESTING = 4
_WEIGHTS = "diffusion_pytorch_model"
#: the libraries' names of component files: `STEM.bin`, `STEM.VARIANT.bin`, and shards of either
_BIN = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model)(\.(?P<variant>\w+))?"
    r"(-(?P<shard>\d+)-of-(?P<count>\d+)(\.(?P<old_variant>\w+))?)?\.bin"
)
#: part of a copy's name; increase it to create all copies again
_VERSION = 2


def folder_as_safetensors(folder: Path) -> Path:
    """Return a pipeline folder; if parts have only pickled weights, a copy with safetensors.

    The copy is in the user's cache, named by the SHA-256 of its sources. Of several variants of a
    part's weights, it contains the main one; see `_main_weights`.

    Raises:
        AfaError: if file names are unknown or a shard is missing; see also `as_safetensors`.
    """
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and _is_pickled(part)]
    if not policy().allow_pickle or not parts:
        return folder
    if (folder / "model_index.json").is_file():  # other subfolders may be training states
        named = parts_of(read_json(folder / "model_index.json"))
        parts = [part for part in parts if part.name in named]
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    digest = hashlib.sha256(f"version {_VERSION}\n".encode())
    for file in files:
        digest.update(f"{hash_file(file)}  {file.relative_to(folder).as_posix()}\n".encode())
    copy = cache_folder() / "from-pickles" / digest.hexdigest()
    if not copy.exists():
        with staged(copy) as partial:
            for file in files:
                if file.suffix.lower() not in PICKLES and not file.name.endswith(".bin.index.json"):
                    target = partial / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
            for part in parts:
                tensors = _tensors_of(_main_weights(part))
                stem = "model" if _is_of_transformers(part) else _WEIGHTS
                save_file(tensors, partial / part.name / f"{stem}.safetensors", {"format": "pt"})
    return copy


def _is_pickled(part: Path) -> bool:
    """Whether a component's only weights are pickles."""
    return any(part.glob("*.bin")) and not any(part.glob("*.safetensors"))


def _is_of_transformers(part: Path) -> bool:
    """Whether transformers loads a component, by its name in a pipeline."""
    return part.name.startswith(("text_encoder", "image_encoder", "safety_checker"))


def _main_weights(part: Path) -> list[Path]:
    """Return the pickles that the libraries would load: one file, or all shards of one set.

    The main weights (`diffusion_pytorch_model.bin`) have priority over variants (`.fp16.bin`,
    `.non_ema.bin`). If there are only variants, the first by name is used, as for safetensors
    (`afa.loading.weights.weights_in`). Other pickles, such as `training_args.bin`, are not weights.

    Raises:
        AfaError: if no file has a known name, or a shard is missing.
    """
    named = {file: _BIN.fullmatch(file.name) for file in sorted(part.glob("*.bin"))}
    expected = "pytorch_model" if _is_of_transformers(part) else _WEIGHTS
    variants: dict[tuple[bool, str], list[tuple[Path, re.Match[str]]]] = {}
    for file, name in named.items():
        if name is not None:
            variant = name["variant"] or name["old_variant"] or ""
            variants.setdefault((name["stem"] != expected, variant), []).append((file, name))
    if not variants:
        raise AfaError(
            "AFA-LOAD-093",
            f"The pickled weights in '{part}' are named {', '.join(file.name for file in named)}; "
            f"the name must be {_WEIGHTS}.bin or pytorch_model.bin, or a shard of these. Rename "
            "the file with the weights.",
        )
    found = variants[min(variants)]
    whole = [file for file, name in found if name["shard"] is None]
    if whole:
        return whole[:1]
    counts = {int(name["count"]) for _, name in found}
    numbers = [int(name["shard"]) for _, name in found]
    if counts != {len(found)} or sorted(numbers) != list(range(1, len(found) + 1)):
        raise AfaError(
            "AFA-LOAD-094",
            f"The pickled weights in '{part}' are {', '.join(file.name for file, _ in found)}; the "
            "set must have every shard once. Download the folder again.",
        )
    return [file for file, _ in found]


def _tensors_of(shards: Sequence[Path]) -> dict[str, Any]:
    """Read the tensors of all shards by name.

    Raises:
        AfaError: if two shards have a tensor of the same name; see also `_read`.
    """
    tensors: dict[str, Any] = {}
    for file in shards:
        for name, tensor in _read(file).items():
            if name in tensors:
                raise AfaError(
                    "AFA-LOAD-095",
                    f"The shard '{file}' has the tensor '{name[:80]}' of an earlier shard; every "
                    "tensor must be in one shard. Download the folder again.",
                )
            tensors[name] = tensor
    return tensors


def as_safetensors(path: Path) -> Path:
    """Convert a pickled checkpoint to a safetensors file in the user's cache.

    Uses torch's restricted unpickler, `torch.load(weights_only=True)`, which creates only tensors
    and plain containers. The copy is named by the pickle's SHA-256, so each pickle is read once.

    Raises:
        AfaError: if pickles are not allowed, or it contains anything other than tensors.
    """
    if not policy().allow_pickle:
        raise AfaError(
            "AFA-LOAD-096",
            f"'{path}' is a pickle, which can run code when it is opened; weights must be "
            "safetensors. Use the .safetensors file, or pass --allow-pickle to read only tensors.",
        )
    if not path.is_file():
        raise AfaError("AFA-LOAD-097", f"'{path}' does not exist. Check the path.")
    digest = hash_file(path)
    copy = cache_folder() / "from-pickles" / f"{digest}.safetensors"
    if not copy.exists():
        tensors = _read(path)
        with staged(copy) as partial:
            save_file(tensors, partial, metadata={"format": "pt", "pickle_sha256": digest})
    return copy


def _read(path: Path) -> dict[str, Any]:
    with loading(f"'{path}' must be a complete pickled checkpoint", "Download it again."):
        try:
            with warnings.catch_warnings():  # about pickles that torch did not write
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise AfaError(
                "AFA-LOAD-098",
                f"'{path}' is not a pickle of tensors alone: {said_by(error)}. A pickled "
                "checkpoint must contain only tensors. Use the .safetensors file.",
            ) from None
    for _ in range(_MAX_NESTING):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    found = content.items() if isinstance(content, dict) else ()
    # copies, since safetensors does not support tensors that share memory
    tensors = {
        key: value.detach().clone().contiguous()
        for key, value in found
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise AfaError(
            "AFA-LOAD-099", f"'{path}' contains no tensors by name; it must be a checkpoint."
        )
    return tensors
