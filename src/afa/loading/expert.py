"""Load the parts of one expert from a folder or a single file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

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
from afa.loading.prediction import scheduler_of
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
        found = load_single_file(
            manifest.path, manifest.described, manifest.companions, with_vae=with_vae
        )
        return _expert(manifest, found)
    with loading_model(manifest.source.source):
        return _expert(manifest, _load_folder(manifest))


def _expert(manifest: ExpertManifest, parts: dict[str, Any]) -> Expert:
    """Make an expert of its loaded parts, in which optional ones may be None."""
    prediction = manifest.described.prediction
    # an ensemble folder has to store the prediction type that nothing else states
    kept = None if prediction is None else prediction.kept
    named = {name: part for name, part in parts.items() if part is not None}
    options = manifest.index.items()
    return Expert(
        replace(manifest.reference, prediction_type=kept),
        manifest.kind,
        str(manifest.index.get("_class_name")),
        denoiser=parts[manifest.kind.denoiser],
        text_encoders={n: part for n, part in named.items() if n.startswith("text_encoder")},
        tokenizers={n: part for n, part in named.items() if n.startswith("tokenizer")},
        scheduler=parts["scheduler"],
        config=manifest.config,
        vae=parts.get("vae"),
        latents=latents_of(manifest.config / "vae" / "config.json"),
        options={n: v for n, v in options if not n.startswith("_") and not isinstance(v, list)},
    )


def _load_folder(manifest: ExpertManifest) -> dict[str, Any]:
    """Load all parts of a pipeline folder except the autoencoder."""
    path, kind, classes = manifest.path, manifest.kind, parts_of(manifest.index)
    dtype = manifest.companions.torch_dtype
    denoiser = load_weights(kind.family.model_class, path / kind.denoiser, torch_dtype=dtype)
    parts: dict[str, Any] = {kind.denoiser: denoiser}
    for name in [name for name in classes if name.startswith("text_encoder")]:
        parts[name] = load_text_encoder(path / name, classes[name], dtype)
        # a tokenizer without its text encoder is not used
        tokenizer = name.replace("text_encoder", "tokenizer")
        if tokenizer in classes:
            parts[tokenizer] = load_tokenizer(path / tokenizer, classes[tokenizer])
    return {**parts, "scheduler": scheduler_of(path, manifest.described.prediction)}
