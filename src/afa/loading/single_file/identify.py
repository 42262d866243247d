"""Single files of the original codes: which model is it, and what does the file leave out?

The package ships the configuration and the tokenizers of every family's published models, in
`afa/configs`, so that no hub is asked for them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.family import Ambiguous, FileDenoiser
from afa.denoisers.kinds import kind_of
from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, staged, write_atomic
from afa.loading.prediction import marks_in
from afa.loading.single_file.accounting import account
from afa.loading.single_file.layout import (
    denoiser_in,
    kind_name,
    layout_of,
    names_by_part,
    readable_kinds,
)
from afa.loading.weights import Shapes

if TYPE_CHECKING:
    from afa.denoisers import PipelineKind

__all__ = [
    "Ambiguous",
    "Shapes",
    "config_folder",
    "config_of",
    "configs",
    "kind_name",
    "missing_parts",
    "refuse_lora",
]

_LORA = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.")


def configs() -> list[str]:
    """The names of the configurations that ship."""
    return sorted(file.stem for file in _assets().glob("*.json"))


def config_folder(name: str) -> Path:
    """A pipeline folder without weights: configurations, scheduler and tokenizers of a model.

    Written into the user's cache on first use, see `afa.files.cache_folder`.

    Raises:
        AfaError: none of this name ships.
    """
    if name not in configs():
        raise AfaError(
            "AFA-LOAD-068",
            f"A shipped configuration is one of {', '.join(configs())}, came '{name}'.",
        )
    folder = cache_folder() / f"configs-{_digest()[:16]}" / name
    if not folder.exists():
        try:
            with staged(folder) as partial:
                partial.mkdir()
                _write_config(read_json(_assets() / f"{name}.json"), partial)
        except OSError:
            if not folder.exists():  # unless another process was quicker
                raise
    return folder


def _write_config(content: dict[str, Any], folder: Path) -> None:
    write_atomic(folder / "model_index.json", json.dumps(content.pop("model_index"), indent=2))
    for part, settings in content.items():
        (folder / part).mkdir()
        name = "config.json"
        if part.startswith("tokenizer"):
            name = "tokenizer_config.json"
            is_clip = settings["tokenizer_class"] == "CLIPTokenizer"
            for file in (_assets() / ("clip" if is_clip else "t5")).iterdir():
                shutil.copyfile(file, folder / part / file.name)
        elif part == "scheduler":
            name = "scheduler_config.json"
        write_atomic(folder / part / name, json.dumps(settings, indent=2) + "\n")


def _assets() -> Path:
    return Path(str(resources.files("afa") / "configs"))


@functools.cache
def _digest() -> str:
    """SHA-256 over what ships, so that another release has another cache."""
    digest = hashlib.sha256()
    for file in sorted(_assets().rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(_assets()).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


# -- which model a file holds -----------------------------------------------------------------


def config_of(
    shapes: Shapes, source: object, prediction_type: str | None = None, *, own_vae: bool = True
) -> str | Path:
    """The configuration that a single file needs, told by its tensors; see `SingleFiles`.

    Args:
        shapes: of all tensors of the file.
        source: for the errors.
        prediction_type: what it predicts, where its marker tensors do not say it.
        own_vae: whether its autoencoder is to be used, and must fit.

    Returns: the name of a shipped one, or a pipeline's folder.

    Raises:
        AfaError: the file is of no family that is known, or of an unusual member of one; or it has
            tensors that the configuration has no use for, or lacks some, see
            `afa.loading.single_file.accounting`.
        Ambiguous: it is one of several models that no tensor tells apart.
    """
    found = denoiser_in(shapes)
    if found is None:
        raise AfaError(
            "AFA-LOAD-069",
            f"A single file must hold a model in the layout of {readable_kinds()}; '{source}' "
            f"starts with '{min(shapes, default='nothing')}'. If it is one of a known family, "
            "describe it: config=FOLDER, a diffusers folder of its family.",
        )
    bare = {
        name.removeprefix(found.prefix): shape
        for name, shape in shapes.items()
        if name.startswith(found.prefix)
    }
    marks = marks_in(shapes)
    edm = next((mark for mark in marks if mark.is_edm), None)
    if edm is not None:
        raise AfaError(
            "AFA-LOAD-070",
            f"'{source}' must be described: it predicts on continuous noise levels ({edm.where}), "
            "which no shipped configuration does, and cannot be mixed with other models. Leave it "
            "out, or name a diffusers folder of it with an EDM scheduler, config=FOLDER.",
        )
    told = layout_of(found.kind, source).configuration(
        FileDenoiser(
            bare,
            found.is_diffusers,
            source,
            predicts=prediction_type or next((mark.type for mark in marks if mark.type), None),
            has_zero_snr=any(mark.zero_snr for mark in marks),
        )
    )
    folder = told if isinstance(told, Path) else config_folder(told)
    account(shapes, folder, source, own_vae=own_vae)
    return told


def refuse_lora(shapes: Shapes, source: object) -> None:
    """Refuse a file that changes a model and is none.

    Raises:
        AfaError: says how to name it.
    """
    if any(mark in name for name in shapes for mark in _LORA):
        raise AfaError(
            "AFA-LOAD-071",
            f"An expert must be a whole model; '{source}' is a LoRA. Name the model that it is for "
            "as well: {base: MODEL, lora: FILE}.",
        )


# -- what a file leaves out -------------------------------------------------------------------


def missing_parts(shapes: Shapes, config: Path) -> list[str]:
    """The parts with weights that a pipeline has and a file lacks.

    Args:
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
    """
    kind = described_kind(config)
    named, found = parts_of(read_json(config / "model_index.json")), names_by_part(shapes, kind)
    return [part for part in kind.file_parts if part in named and part not in found]


def described_kind(folder: Path) -> PipelineKind:
    """Of the pipeline that a folder describes."""
    index = read_json(folder / "model_index.json")
    return kind_of(str(index.get("_class_name")), folder)
