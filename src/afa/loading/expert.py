"""One expert and its parts, from a folder or a single file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from afa.ensemble.references import ExpertReference
from afa.files import parts_of
from afa.loading.components import load_text_encoder, load_weights, loading_model
from afa.loading.expert_source import AnySource
from afa.loading.loaded import Expert, latents_of
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.prediction import Prediction, scheduler_of
from afa.loading.single_file.load import Companions, load_single_file
from afa.loading.sources import require_hash
from afa.loading.weights import keep_no_words
from afa.machine.library import library_class


def load_expert(
    source: AnySource,
    *,
    companions: Companions | None = None,
    with_vae: bool = True,
    torch_dtype: torch.dtype = torch.float32,
) -> Expert:
    """Load one expert's parts; of a folder all but the autoencoder.

    Args:
        source: without its LoRA.
        companions: what a single file may leave out; None uses what ships.
        with_vae: whether a single file's autoencoder is read, too.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: nothing is there, a pickle, another hash, a damaged or incomplete model, or a
            family that is not supported.
    """
    companions = companions or Companions(torch_dtype)
    return load_described(read_manifest(source, companions), with_vae=with_vae)


def load_described(manifest: ExpertManifest, *, with_vae: bool = True) -> Expert:
    """Load the parts of an expert that was found; see `load_expert`.

    Raises:
        AfaError: another hash, a damaged or an incomplete model.
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
    """A reference with what an ensemble folder has to remember of what the model predicts."""
    kept = None if prediction is None else prediction.kept
    return replace(reference, prediction_type=kept)


def _named(parts: dict[str, Any], start: str) -> dict[str, Any]:
    found = {name: part for name, part in parts.items() if name.startswith(start)}
    return {name: part for name, part in found.items() if part is not None}


def _options(index: dict[str, Any]) -> dict[str, Any]:
    """What a `model_index.json` says besides naming parts."""
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and not isinstance(entry, list)
    }


def _load_folder(manifest: ExpertManifest) -> Expert:
    """All but the autoencoder of a pipeline's folder."""
    path, kind, index = manifest.path, manifest.kind, manifest.index
    torch_dtype, prediction = manifest.companions.torch_dtype, manifest.described.prediction
    classes = parts_of(index)
    encoders = [name for name in classes if name.startswith("text_encoder")]
    # one without its encoder is of no use, and others may lack it
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
            name: keep_no_words(
                library_class(
                    transformers, classes[name], transformers.PreTrainedTokenizerBase
                ).from_pretrained(path / name)
            )
            for name in tokenizers
            if name in classes
        },
        scheduler=scheduler_of(path, prediction),
        config=path,
        latents=latents_of(path / "vae" / "config.json"),
        options=_options(index),
    )
