"""The embedded default: emoji scenes, a small base model, its three experts and the judges.

What ships is one float16 copy of everything; `export_zoo` writes it out as ordinary diffusers
pipeline folders. An expert's name in a recipe is `zoo:animals`, `zoo:food`, `zoo:things`, and
`zoo:base` for the model they were fine-tuned from.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import torch

from afa.errors import AfaError
from afa.files import cache_folder, write_atomic
from afa.zoo.sprites import DOMAINS

EXPERTS = tuple(DOMAINS)
MODELS = ("base", *EXPERTS)
_SHARED = "shared"


def assets() -> Path:
    """The folder of the shipped files."""
    return Path(str(resources.files("afa.zoo") / "assets"))


def shipped(name: str) -> Path:
    """The folder behind `zoo:NAME`: a model's pipeline, or the trained `ensemble` of the experts.

    Raises:
        AfaError: no such thing ships.
    """
    return assets() / name if name == "ensemble" else expert_folder(name)


def export_zoo(directory: str | Path, source: Path | None = None) -> Path:
    """Write base and experts as stock Stable Diffusion pipeline folders, in float32.

    `StableDiffusionPipeline.from_pretrained(directory / "animals")` then runs as it is.

    Args:
        directory: a new or empty folder; gets `base`, `animals`, `food` and `things`.
        source: the assets of `afa zoo build`; None takes the shipped ones.

    Returns: `directory`.

    Raises:
        AfaError: the folder exists and holds something.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AfaError(
            "AFA-ZOO-001", f"The output folder must be new; '{directory}' exists. Name another one."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for name in MODELS:
            for part in (_SHARED, name):
                copy_as((source or assets()) / part, partial / name, torch.float32)
        partial.chmod(0o755)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def expert_folder(name: str) -> Path:
    """The pipeline folder of a shipped model, written into the user's cache on first use.

    See `afa.files.cache_folder`.

    Raises:
        AfaError: no such model ships.
    """
    if name not in MODELS:
        known = ", ".join(f"zoo:{known}" for known in (*MODELS, "ensemble"))
        raise AfaError("AFA-ZOO-002", f"A shipped name must be one of {known}, came 'zoo:{name}'.")
    folder = cache_folder() / f"zoo-{_digest()[:16]}"
    if not folder.exists():
        try:
            export_zoo(folder)
        except OSError:
            if not folder.exists():  # unless another process was quicker
                raise
    return folder / name


@functools.cache
def _digest() -> str:
    """SHA-256 over the shipped files, so that another release has another cache."""
    digest = hashlib.sha256()
    for part in (_SHARED, *MODELS):
        for file in sorted((assets() / part).rglob("*")):
            if file.is_file():
                digest.update(file.relative_to(assets()).as_posix().encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def copy_as(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a folder; the floating-point tensors of its safetensors files become `dtype`."""
    from safetensors.torch import load_file, save

    for file in sorted(source.rglob("*")):
        copy = target / file.relative_to(source)
        if file.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
            write_atomic(copy, save(cast, metadata={"format": "pt"}))
        else:
            shutil.copyfile(file, copy)
