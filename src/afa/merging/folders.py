"""What of a pipeline folder is not merged: configurations, tokenizer, scheduler and the like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from afa.files import read_json, write_atomic
from afa.loading.trust.pickles import PICKLES
from afa.merging.checkpoints import has_part
from afa.merging.parts import TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Iterable

_WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)
_CHECKER = "safety_checker"
_DTYPES = ("dtype", "torch_dtype")


def weights_file(part: str) -> str:
    """Where a pipeline folder has the weights of one part."""
    stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
    return f"{part}/{stem}.safetensors"


def files_to_copy(folder: Path, merged_parts: set[str]) -> list[Path]:
    """The files that a merge takes from the first expert, relative to its folder.

    Of merged parts all but the weights; of other components (a safety checker) all but pickles;
    a component whose only weights are pickles is left out.
    """
    files: list[Path] = []
    index = read_json(folder / "model_index.json")
    for part in filter(lambda part: has_part(index, part), index):
        found = [file for file in sorted((folder / part).rglob("*")) if file.is_file()]
        if part in merged_parts:
            found = [file for file in found if not file.name.endswith(_WEIGHTS)]
        elif not any(file.suffix == ".safetensors" for file in found):
            # a tokenizer has no weights at all
            found = [] if any(file.suffix in PICKLES for file in found) else found
        found = [file for file in found if file.suffix not in PICKLES]
        files += [file.relative_to(folder) for file in found]
    return files


def copy_files(
    folder: Path, files: list[Path], target: Path, merged_parts: Iterable[str], dtype: str | None
) -> None:
    """Copy, and write a `model_index.json` that names what is there.

    Args:
        folder: of the first expert.
        files: see `files_to_copy`.
        target: the new folder, with the merged weights.
        merged_parts: whose weights were merged, or written in another type.
        dtype: of those weights, where the recipe sets it; transformers loads in the type that a
            part's configuration names, and would round them to the first expert's.
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
    for part in index:
        if has_part(index, part) and not (target / part).is_dir():
            index[part] = [None, None]
            if part == _CHECKER:
                index["requires_safety_checker"] = False
    write_atomic(target / "model_index.json", json.dumps(index, indent=2) + "\n")
