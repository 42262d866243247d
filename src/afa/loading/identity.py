"""The identity of one model: hashes of everything that changes its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.lora import hash_lora
from afa.loading.manifest import read_manifest
from afa.loading.weights import hash_files, hash_pipeline

if TYPE_CHECKING:
    from afa.loading.single_file.load import Companions

#: suffixes of configurations and vocabularies in a pipeline's folder
_DESCRIPTIONS = frozenset({".json", ".txt", ".model"})
_TOP = ("model_index.json", "model_config.json", "config.json")


def identity_of(named: AnySource, companions: Companions) -> list[str]:
    """Return the identity of one model: its weights, configuration, scheduler and LoRA.

    Args:
        named: the source of the model.
        companions: parts that a single file lacks; their identity is not included.

    Raises:
        AfaError: if the model cannot be read.
    """
    source = ExpertSource.of(named)
    manifest = read_manifest(source, companions)
    prediction = manifest.described.prediction
    found = [hash_pipeline(manifest.path), hash_descriptions(manifest.config)]
    if prediction is not None and prediction.scheduler is not None:
        found.append(f"scheduler with {dict(prediction.scheduler)}")
    if source.lora is not None:
        found.append(f"{source.scale!r} x {hash_lora(Path(source.lora))}")
    return found


def hash_descriptions(folder: Path) -> str:
    """SHA-256 of all files except weights in the folder of a pipeline or a component."""
    files = [folder / name for name in _TOP]
    files += [file for file in folder.glob("*/*") if file.suffix in _DESCRIPTIONS]
    chosen = sorted(f for f in files if f.is_file() and not f.name.endswith(".index.json"))
    return hash_files(folder, chosen)
