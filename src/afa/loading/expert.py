"""Load the parts of one expert from a folder or a single file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from afa.ensemble.references import ExpertReference
from afa.files import parts_of
from afa.loading.components import (
    load_text_encoder,
    load_tokenizer,
    load_weights,
    loading_model,
)
from afa.loading.expert_source import AnySource
from afa.loading.loaded import Expert, latents_of
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.prediction import Prediction, scheduler_of
from afa.loading.single_file.load import Companions, load_single_file
from afa.loading.sources import require_hash


def load_expert(
    source: AnySource,
    *,
    companions: Companions | None = None,
    with_vae: bool = True,
    torch_dtype: torch.dtype = torch.float32,
) -> Expert:
    """Load one expert's parts; from a folder all but the autoencoder.

    Args:
        source: the expert; its LoRA is ignored.
        companions: parts missing in a single file; None uses the bundled configurations.
        with_vae: whether the autoencoder of a single file is loaded, too.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: if the source does not exist, is a pickle, damaged or incomplete, has another
            hash, or its family is not supported.
    """
    companions = companions or Companions(torch_dtype)
    return load_described(read_manifest(source, companions), with_vae=with_vae)


def load_described(manifest: ExpertManifest, *, with_vae: bool = True) -> Expert:
    """Load the parts of an expert from its manifest; see `load_expert`.

    Raises:
        AfaError: if the model has another hash, is damaged or incomplete.
    """
    require_hash("Expert", manifest.reference, manifest.source.sha256)
    if manifest.path.is_file():
        return _load_file(manifest, with_vae)
    with loading_model(manifest.source.source):
        return _load_folder(manifest)


def _load_file(manifest: ExpertManifest, with_vae: bool) -> Expert:
    described, config = manifest.described, manifest.config
    parts = load_single_file(manifest.path, described, manifest.companions, with_vae=with_vae)
    kind = manifest.kind
    return Expert(
        _as_described(manifest.reference, described.prediction),
        kind,
        str(manifest.index["_class_name"]),
        denoiser=parts[kind.denoiser],
        text_encoders=_named(parts, "text_encoder"),
        tokenizers=_named(parts, "tokenizer"),
        scheduler=parts["scheduler"],
        config=config,
        vae=parts["vae"],
        latents=latents_of(config / "vae" / "config.json"),
        options=_options(manifest.index),
    )


def _as_described(reference: ExpertReference, prediction: Prediction | None) -> ExpertReference:
    """Add the prediction type to a reference, if an ensemble folder has to store it."""
    kept = None if prediction is None else prediction.kept
    return replace(reference, prediction_type=kept)


def _named(parts: dict[str, Any], start: str) -> dict[str, Any]:
    found = {name: part for name, part in parts.items() if name.startswith(start)}
    return {name: part for name, part in found.items() if part is not None}


def _options(index: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a `model_index.json` that are not components."""
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and not isinstance(entry, list)
    }


def _load_folder(manifest: ExpertManifest) -> Expert:
    """Load all parts of a pipeline folder except the autoencoder."""
    path, kind, index = manifest.path, manifest.kind, manifest.index
    torch_dtype, prediction = manifest.companions.torch_dtype, manifest.described.prediction
    classes = parts_of(index)
    encoders = [name for name in classes if name.startswith("text_encoder")]
    # a tokenizer without its text encoder is not used
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    return Expert(
        _as_described(manifest.reference, prediction),
        kind,
        str(index.get("_class_name")),
        denoiser=load_weights(
            kind.family.model_class, path / kind.denoiser, torch_dtype=torch_dtype
        ),
        text_encoders={
            name: load_text_encoder(path / name, classes[name], torch_dtype) for name in encoders
        },
        tokenizers={
            name: load_tokenizer(path / name, classes[name])
            for name in tokenizers
            if name in classes
        },
        scheduler=scheduler_of(path, prediction),
        config=path,
        latents=latents_of(path / "vae" / "config.json"),
        options=_options(index),
    )
