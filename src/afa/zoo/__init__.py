"""The bundled zoo: emoji scenes, a small base model, three experts and the judges.

The package contains one float16 copy of the models; `export_zoo` writes them as ordinary diffusers
pipeline folders. In a recipe the experts are `zoo:animals`, `zoo:food` and `zoo:things`; `zoo:base`
is the model from which they were fine-tuned.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import torch

from afa.errors import AfaError
from afa.files import cache_folder, put_in_place, write_atomic
from afa.zoo.sprites import DOMAINS

EXPERTS = tuple(DOMAINS)
MODELS = ("base", *EXPERTS)
_SHARED = "shared"


def assets() -> Path:
    """The folder of the bundled files."""
    return Path(str(resources.files("afa.zoo") / "assets"))


def shipped(name: str) -> Path:
    """The folder behind `zoo:NAME`: a model's pipeline, or the trained `ensemble` of the experts.

    Raises:
        AfaError: if there is no bundled model of this name.
    """
    return assets() / name if name == "ensemble" else expert_folder(name)


def export_zoo(directory: str | Path, source: Path | None = None) -> Path:
    """Write base and experts as stock Stable Diffusion pipeline folders, in float32.

    `StableDiffusionPipeline.from_pretrained(directory / "animals")` then loads an expert.

    Args:
        directory: a new or empty folder; gets `base`, `animals`, `food` and `things`.
        source: the assets of `afa zoo build`; None uses the bundled ones.

    Returns: `directory`.

    Raises:
        AfaError: if the folder exists and is not empty.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AfaError(
            "AFA-ZOO-001", f"The output folder '{directory}' exists. Pass a new or empty folder."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for name in MODELS:
            for part in (_SHARED, name):
                copy_as((source or assets()) / part, partial / name, torch.float32)
        partial.chmod(0o755)
        put_in_place(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def expert_folder(name: str) -> Path:
    """The pipeline folder of a bundled model, written to `afa.files.cache_folder` on first use.

    Raises:
        AfaError: if there is no bundled model of this name.
    """
    if name not in MODELS:
        known = ", ".join(f"zoo:{known}" for known in (*MODELS, "ensemble"))
        raise AfaError("AFA-ZOO-002", f"There is no bundled 'zoo:{name}'. Use one of {known}.")
    folder = cache_folder() / f"zoo-{_digest()[:16]}"
    if not folder.exists():
        try:
            export_zoo(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
    return folder / name


@functools.cache
def _digest() -> str:
    """SHA-256 of the bundled files, so that every release has a cache of its own."""
    digest = hashlib.sha256()
    for part in (_SHARED, *MODELS):
        for file in sorted((assets() / part).rglob("*")):
            if file.is_file():
                digest.update(file.relative_to(assets()).as_posix().encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def copy_as(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a folder, and cast the floating-point tensors of its safetensors files to `dtype`."""
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
