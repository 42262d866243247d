"""Copy what a merge leaves unchanged in a folder: configurations, tokenizer, scheduler, ..."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from afa.files import parts_of, read_json, write_atomic
from afa.loading.trust.pickles import PICKLES
from afa.merging.parts import TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Iterable

_WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)
_CHECKER = "safety_checker"
_DTYPES = ("dtype", "torch_dtype")


def weights_file(part: str) -> str:
    """The file with the weights of one component of a pipeline folder."""
    stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
    return f"{part}/{stem}.safetensors"


def files_to_copy(folder: Path, merged_parts: set[str]) -> list[Path]:
    """List the files that a merge copies from the first expert, relative to its folder.

    These are all files except pickles and the weights of merged components. Components whose only
    weights are pickles (some safety checkers) are dropped.
    """
    files: list[Path] = []
    for part in parts_of(read_json(folder / "model_index.json")):
        found = [file for file in sorted((folder / part).rglob("*")) if file.is_file()]
        if part in merged_parts:
            found = [file for file in found if not file.name.endswith(_WEIGHTS)]
        elif not any(file.suffix == ".safetensors" for file in found):
            # a tokenizer has no weights
            found = [] if any(file.suffix in PICKLES for file in found) else found
        found = [file for file in found if file.suffix not in PICKLES]
        files += [file.relative_to(folder) for file in found]
    return files


def copy_files(
    folder: Path, files: list[Path], target: Path, merged_parts: Iterable[str], dtype: str | None
) -> None:
    """Copy files, and write a `model_index.json` that lists the copied and merged components.

    Args:
        folder: the first expert's folder.
        files: see `files_to_copy`.
        target: the new folder, with the merged weights.
        merged_parts: components whose weights were merged, or written in another dtype.
        dtype: dtype of those weights if the recipe sets it. It replaces the dtype in the
            configurations, because transformers loads weights in that dtype.
    """
    for file in files:
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, copy)
    for part in merged_parts:
        config = target / part / "config.json"
        content = read_json(config) if dtype is not None and config.is_file() else {}
        named = {key: dtype for key in _DTYPES if content.get(key) not in (None, dtype)}
        if named:
            write_atomic(config, json.dumps(content | named, indent=2) + "\n")
    index = read_json(folder / "model_index.json")
    for part in parts_of(index):
        if not (target / part).is_dir():
            index[part] = [None, None]
            if part == _CHECKER:
                index["requires_safety_checker"] = False
    write_atomic(target / "model_index.json", json.dumps(index, indent=2) + "\n")
