"""Models that were distilled for few steps: LCM, Turbo, Lightning, Hyper, DMD.

They need 1 to 8 steps and little or no guidance, other models 20 to 50 steps. Tensors do not show
it; names, metadata, the scheduler and the embedding of the guidance scale (LCM) do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.denoisers.kinds import kind_of
from afa.files import parts_of, read_json
from afa.loading.weights import file_metadata

if TYPE_CHECKING:
    from pathlib import Path

_METHODS = {
    **{name.lower(): name for name in ("LCM", "Turbo", "Lightning", "Hyper", "TCD", "PCM")},
    **dict.fromkeys(("dmd", "dmd2"), "DMD"),
    "schnell": "schnell",
}
_SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
#: splits `juggernautXL_v9Lightning` into four words, and `hyperrealism` into one
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@dataclass(frozen=True)
class Distilled:
    """The distillation method of a model, and where that information comes from."""

    method: str
    where: str


def distilled_of(
    source: str, folder: Path, *, is_file: bool, path: Path | None = None
) -> Distilled | None:
    """Detect that a model was distilled for few steps; None without evidence.

    Args:
        source: the model's name or path, whose last part is read.
        folder: the pipeline folder that describes it.
        is_file: whether it is a single file, whose scheduler is not its own.
        path: of the file, for its metadata.
    """
    name = source.rstrip("/").rpartition("/")[2]
    method = method_in(name)
    if method is not None:
        return Distilled(method, "its name")
    if path is not None and path.is_file():
        metadata = file_metadata(path)
        for key in ("modelspec.title", "modelspec.tags"):
            method = method_in(metadata.get(key, ""))
            if method is not None:
                return Distilled(method, f"'{key}' in its metadata")
    if is_file:
        return None
    index = read_json(folder / "model_index.json")
    scheduler = parts_of(index).get("scheduler", "")
    if scheduler in _SCHEDULERS:
        return Distilled(_SCHEDULERS[scheduler], f"its scheduler, {scheduler}")
    part = kind_of(str(index.get("_class_name")), folder).denoiser
    if read_json(folder / part / "config.json").get("time_cond_proj_dim"):
        return Distilled("LCM", "time_cond_proj_dim in its configuration")
    return None


def method_in(name: str) -> str | None:
    """The distillation method among the words of a name; None without one."""
    words = [word.lower() for word in _WORDS.findall(name)]
    return next((_METHODS[word] for word in words if word in _METHODS), None)
