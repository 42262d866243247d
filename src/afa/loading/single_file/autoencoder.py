"""Load an autoencoder from a folder, a file or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.autoencoders import autoencoder_named
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.components import load_weights, loading_model
from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.loaded import class_of, latents_of
from afa.loading.single_file.parts import read_vae
from afa.loading.sources import locate_vae, refer
from afa.loading.weights import check_safetensors, hash_files, weights_in
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.ensemble.references import ExpertReference


def require_latents(source: AnySource, expert: str, latents: Mapping[str, Any]) -> None:
    """Check by its configuration that an autoencoder has the latent space of an expert.

    A single file has no configuration, and is read with that of the expert.

    Args:
        source: see `load_vae`.
        expert: the name of the expert.
        latents: its `latents_of`.

    Raises:
        AfaError: if they differ, or the autoencoder does not exist.
    """
    source = ExpertSource.of(source)
    folder = locate_vae(source.source, source.revision)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    found = latents_of(folder / "config.json")
    for key, theirs in latents.items():
        if found and found.get(key) != theirs:
            raise AfaError(
                "AFA-LOAD-128",
                f"The autoencoder '{source.source}' has {key} = {found.get(key)}, that of "
                f"'{expert}' has {theirs}; it must have the latent space of the experts. Set vae "
                "to one of their family, or remove it.",
            )


def load_vae(
    source: AnySource,
    *,
    config: Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> tuple[Any, ExpertReference]:
    """Load an autoencoder from a pipeline folder, a folder of its own, a file or a hub id.

    Args:
        source: see `afa.loading.sources.locate`.
        config: for a single file: a pipeline folder whose `vae/config.json` describes it.

    Raises:
        AfaError: see `afa.loading.expert.load_expert`.
    """
    source = ExpertSource.of(source)
    path = locate_vae(source.source, source.revision)
    if path.is_file():
        check_safetensors(path)
        reference = refer(source, path, hash_file(path))
        with loading_model(source.source, "Set config to a diffusers folder of its family."):
            return read_vae(path, config, torch_dtype), reference
    folder = path / "vae" if (path / "vae").is_dir() else path
    files = weights_in(folder)[1]
    for file in files:
        check_safetensors(file)
    reference = refer(source, path, hash_files(path, files))
    with loading_model(source.source):
        kind = autoencoder_named(class_of(read_json(folder / "config.json")))
        return load_weights(kind.model_class, folder, torch_dtype=torch_dtype), reference
