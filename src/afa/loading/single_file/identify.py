"""Identify the model in a single file, and the parts that the file lacks.

The package contains the configurations and tokenizers of every family's published models in
`afa/configs`, so that they need not be downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.family import FileDenoiser
from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, staged, write_atomic
from afa.loading.prediction import marks_in
from afa.loading.single_file.accounting import account
from afa.loading.single_file.layout import (
    denoiser_in,
    described_kind,
    layout_of,
    names_by_part,
    readable_kinds,
)

if TYPE_CHECKING:
    from afa.loading.weights import Shapes

_LORA = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.")


def configs() -> list[str]:
    """Return the names of the bundled configurations."""
    return sorted(file.stem for file in _assets().glob("*.json"))


def config_folder(name: str) -> Path:
    """Return a pipeline folder without weights: a model's configurations and tokenizers.

    It is written into the user's cache on first use, see `afa.files.cache_folder`.

    Raises:
        AfaError: if there is no bundled configuration of this name.
    """
    if name not in configs():
        raise AfaError(
            "AFA-LOAD-068",
            f"A bundled configuration must be one of {', '.join(configs())}; got '{name}'.",
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
    """SHA-256 of the bundled configurations, so that another release has another cache."""
    digest = hashlib.sha256()
    for file in sorted(_assets().rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(_assets()).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


# -- identify the model -----------------------------------------------------------------------


def config_of(
    shapes: Shapes, source: object, prediction_type: str | None = None, *, own_vae: bool = True
) -> str | Path:
    """Find the configuration of a single file from its tensors; see `SingleFiles`.

    Args:
        prediction_type: what it predicts, if its marker tensors do not say so.
        own_vae: whether its autoencoder is used and must fit.

    Returns: the name of a bundled configuration, or a pipeline folder.

    Raises:
        AfaError: if the family is unknown, the model is not one of the published ones, or tensors
            are unused or missing, see `afa.loading.single_file.accounting`.
        Ambiguous: if it is one of several models with equal tensors.
    """
    found = denoiser_in(shapes)
    if found is None:
        raise AfaError(
            "AFA-LOAD-069",
            f"The layout of '{source}' is unknown (first tensor: '{min(shapes, default='none')}'); "
            f"a single file must hold a model of {readable_kinds()}. If it is one, set config to a "
            "diffusers folder of its family.",
        )
    tensors = {
        name.removeprefix(found.prefix): shape
        for name, shape in shapes.items()
        if name.startswith(found.prefix)
    }
    marks = marks_in(shapes)
    edm = next((mark for mark in marks if mark.is_edm), None)
    if edm is not None:
        raise AfaError(
            "AFA-LOAD-070",
            f"'{source}' is an EDM model with continuous noise levels ({edm.where}), for which "
            "there is no bundled configuration. It cannot be combined with other models. Remove "
            "it, or set config to a diffusers folder of it with an EDM scheduler.",
        )
    config = layout_of(found.kind, source).configuration(
        FileDenoiser(
            tensors,
            found.is_diffusers,
            source,
            predicts=prediction_type or next((mark.type for mark in marks if mark.type), None),
            has_zero_snr=any(mark.zero_snr for mark in marks),
        )
    )
    folder = config if isinstance(config, Path) else config_folder(config)
    account(shapes, folder, source, own_vae=own_vae)
    return config


def refuse_lora(shapes: Shapes, source: object) -> None:
    """Check that a file is a model and not a LoRA.

    Raises:
        AfaError: if it is a LoRA.
    """
    if any(mark in name for name in shapes for mark in _LORA):
        raise AfaError(
            "AFA-LOAD-071",
            f"'{source}' is a LoRA; an expert must be a complete model. Add the base model: "
            "{base: MODEL, lora: FILE}.",
        )


def missing_parts(shapes: Shapes, config: Path) -> list[str]:
    """Return the parts with weights that a pipeline has and a file lacks."""
    kind = described_kind(config)
    named, found = parts_of(read_json(config / "model_index.json")), names_by_part(shapes, kind)
    return [part for part in kind.file_parts if part in named and part not in found]
