"""Pickled checkpoints, for whoever allows them: tensors are taken out, no code in them is run.

What comes of it is a safetensors file in the user's cache, and everything else reads that.
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
#: of components, as the libraries name them: `STEM.bin`, `STEM.VARIANT.bin`, and shards of either
_BIN = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model)(\.(?P<variant>\w+))?"
    r"(-(?P<shard>\d+)-of-(?P<count>\d+)(\.(?P<old_variant>\w+))?)?\.bin"
)
#: part of a copy's name; another number makes all copies again
_VERSION = 2


def folder_as_safetensors(folder: Path) -> Path:
    """A pipeline's folder, where a part has its weights in pickles alone a copy of it without any.

    The copy is in the user's cache, named after the SHA-256 of all that it was made of. Of several
    variants of a part's weights, it has the main one; see `_main_weights`.

    Raises:
        AfaError: see `as_safetensors`; a part whose files are not named as the libraries do, or
            that lacks a shard.
    """
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and _is_pickled(part)]
    if not policy().allow_pickle or not parts:
        return folder
    if (folder / "model_index.json").is_file():  # a folder may hold more, as a training's states
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
                    place = partial / file.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place)
            for part in parts:
                tensors = _tensors_of(_main_weights(part))
                stem = "model" if _is_of_transformers(part) else _WEIGHTS
                save_file(tensors, partial / part.name / f"{stem}.safetensors", {"format": "pt"})
    return copy


def _is_pickled(part: Path) -> bool:
    """Whether a component's only weights are pickles."""
    return any(part.glob("*.bin")) and not any(part.glob("*.safetensors"))


def _is_of_transformers(part: Path) -> bool:
    """Whether a component is read by transformers, by its name in a pipeline."""
    return part.name.startswith(("text_encoder", "image_encoder", "safety_checker"))


def _main_weights(part: Path) -> list[Path]:
    """The pickles that the libraries would read: one file, or all shards of one set of weights.

    The main weights (`diffusion_pytorch_model.bin`) come before variants (`.fp16.bin`,
    `.non_ema.bin`); where there are variants alone, the first by name is taken, as among
    safetensors (`afa.loading.weights.weights_in`). Other pickles, such as `training_args.bin`,
    are not weights.

    Raises:
        AfaError: no file has a name that the libraries know, or a shard is missing.
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
            f"they must be {_WEIGHTS}.bin or pytorch_model.bin, or shards of these. Rename the "
            "file that has the weights.",
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
            f"The pickled weights in '{part}' are {', '.join(file.name for file, _ in found)}; all "
            "shards of one set must be there, each once. Download the folder again.",
        )
    return [file for file, _ in found]


def _tensors_of(shards: Sequence[Path]) -> dict[str, Any]:
    """The tensors of all shards by name.

    Raises:
        AfaError: see `_read`; or two shards have a tensor of one name.
    """
    tensors: dict[str, Any] = {}
    for file in shards:
        for name, tensor in _read(file).items():
            if name in tensors:
                raise AfaError(
                    "AFA-LOAD-095",
                    f"The shard '{file}' holds '{name[:80]}', and so does an earlier one; every "
                    "tensor must be in one shard. Download the folder again.",
                )
            tensors[name] = tensor
    return tensors


def as_safetensors(path: Path, what: str = "Experts") -> Path:
    """The tensors of a pickled checkpoint as a safetensors file in the user's cache.

    They are read by torch's restricted unpickler, `torch.load(weights_only=True)`, which makes
    tensors and plain containers and nothing else. The copy is named after the pickle's SHA-256, so
    a pickle is read once.

    Args:
        path: of the pickle.
        what: it is, for the error.

    Raises:
        AfaError: pickles are not allowed, or it holds anything but tensors.
    """
    if not policy().allow_pickle:
        raise AfaError(
            "AFA-LOAD-096",
            f"{what} must be safetensors; '{path}' is a pickle, which can run code when it is "
            "opened. Get the .safetensors file, or read its tensors alone: --allow-pickle.",
        )
    if not path.is_file():
        raise AfaError(
            "AFA-LOAD-097", f"{what} must be there, but '{path}' does not exist. Check the path."
        )
    digest = hash_file(path)
    copy = cache_folder() / "from-pickles" / f"{digest}.safetensors"
    if not copy.exists():
        tensors = _read(path)
        with staged(copy) as partial:
            save_file(tensors, partial, metadata={"format": "pt", "pickle_sha256": digest})
    return copy


def _read(path: Path) -> dict[str, Any]:
    with loading(f"'{path}' must be a whole pickled checkpoint", "Download it again."):
        try:
            with warnings.catch_warnings():  # of pickles that torch did not write: harmless
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise AfaError(
                "AFA-LOAD-098",
                f"A pickled checkpoint must hold tensors alone; of '{path}' torch says that "
                f"{said_by(error)}. Get the .safetensors file.",
            ) from None
    for _ in range(_MAX_NESTING):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    found = content.items() if isinstance(content, dict) else ()
    # copies: the format refuses tensors that share memory
    tensors = {
        key: value.detach().clone().contiguous()
        for key, value in found
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise AfaError(
            "AFA-LOAD-099", f"'{path}' must hold tensors by name; it has none. Is it a checkpoint?"
        )
    return tensors
