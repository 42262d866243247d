"""One expert and its parts, from a folder or a single file."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL

from afa.denoisers.kinds import kind_of
from afa.ensemble.references import ExpertReference
from afa.files import parts_of, read_json
from afa.loading.components import load_text_encoder, load_weights, loading_model
from afa.loading.loaded import LATENTS, Expert
from afa.loading.prediction import Prediction, scheduler_of
from afa.loading.single_file.load import Companions, describe_expert, load_single_file
from afa.loading.sources import locate, refer, require_hash
from afa.loading.weights import hash_expert, keep_no_words
from afa.machine.library import library_class


def load_expert(
    source: str | Path,
    *,
    revision: str | None = None,
    companions: Companions | None = None,
    with_vae: bool = True,
    sha256: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> Expert:
    """Load one expert's parts; of a folder all but the autoencoder.

    Args:
        source: see `afa.loading.sources.locate`.
        revision: of a hub id.
        companions: what a single file may leave out; None is nothing but what ships.
        with_vae: whether a single file's autoencoder is read, too.
        sha256: that its weights must have; None takes any.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: nothing is there, a pickle, another hash, a damaged or incomplete model, or a
            family that is not supported.
    """
    path = locate(source, revision)
    companions = companions or Companions(torch_dtype)
    index = path / "model_index.json"
    if index.is_file():  # before its weights are looked for, which other families name otherwise
        kind_of(str(read_json(index).get("_class_name")), source)
    reference = refer(source, path, hash_expert(path), revision)
    require_hash("Expert", reference, sha256)
    if path.is_file():
        return _load_file(reference, path, companions, with_vae)
    prediction = describe_expert(path, companions).prediction
    with loading_model(source):
        return _load_folder(reference, path, torch_dtype, prediction)


def _load_file(
    reference: ExpertReference, path: Path, companions: Companions, with_vae: bool
) -> Expert:
    described, parts = load_single_file(path, companions, with_vae=with_vae)
    config = described.config
    index = read_json(config / "model_index.json")
    class_name = str(index["_class_name"])
    kind = kind_of(class_name, path)
    return Expert(
        _as_described(reference, described.prediction),
        kind,
        class_name,
        denoiser=parts[kind.denoiser],
        text_encoders=_named(parts, "text_encoder"),
        tokenizers=_named(parts, "tokenizer"),
        scheduler=parts["scheduler"],
        config=config,
        vae=parts["vae"],
        latents=latents_of(config / "vae" / "config.json"),
        options=_options(index),
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


def _load_folder(
    reference: ExpertReference,
    path: Path,
    torch_dtype: torch.dtype,
    prediction: Prediction | None,
) -> Expert:
    """All but the autoencoder of a pipeline's folder."""
    index = read_json(path / "model_index.json")
    class_name = str(index.get("_class_name"))
    kind = kind_of(class_name, reference.source)
    classes = parts_of(index)
    encoders = [name for name in classes if name.startswith("text_encoder")]
    # one without its encoder is of no use, and others may lack it
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    return Expert(
        _as_described(reference, prediction),
        kind,
        class_name,
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


def latents_of(config: Path) -> dict[str, Any]:
    """What an autoencoder's configuration says of the latents, with the library's defaults."""
    if not config.is_file():
        return {}
    found, defaults = read_json(config), inspect.signature(AutoencoderKL).parameters
    return {key: found.get(key, defaults[key].default) for key in LATENTS}
