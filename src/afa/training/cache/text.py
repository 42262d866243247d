"""Disk cache of the text encoders' embeddings of captions."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, options_of
from afa.ensemble.prompts import PromptEncoder, PromptTokenizer
from afa.ensemble.text import EnsembleTextEncoder, configuration_of, hash_weights
from afa.provenance import releases
from afa.training.cache.files import (
    BATCH,
    SHARD,
    VERSION,
    CacheProgress,
    Shards,
    digest,
    write_shard,
)
from afa.training.encoding import encode_captions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor


class TextCache:
    """The text embeddings of captions, encoded by an ensemble's text encoders.

    Shards are named after a hash of their captions, so data sets with the same captions share them.
    If each expert has one text encoder, as in Stable Diffusion, each expert's embeddings are cached
    separately; with several encoders they are cached together.

    Args:
        folder: folder of all caches.
        pipeline: pipeline with the tokenizers and text encoders.
        captions: distinct captions.
    """

    def __init__(self, folder: Path, pipeline: DiffusionPipeline, captions: Sequence[str]) -> None:
        self._pipeline = pipeline
        parts = pipeline.components
        names = sorted(name for name in parts if name.startswith("text_encoder") and parts[name])
        tokens = [
            hash_tokenizer(part)
            for name, part in sorted(parts.items())
            if name.startswith("tokenizer") and part is not None
        ]
        settings = {
            "tokenizers": tokens,
            "options": options_of(pipeline),
            "width": getattr(denoiser_of(pipeline).config, "joint_attention_dim", None),
            "releases": releases("torch", "diffusers", "transformers"),
        }
        first = parts[names[0]]
        #: index of each expert's text encoder; None if embeddings are not split by expert
        self._encoder_of: list[int] | None = None
        if len(names) == 1 and getattr(first, "is_joined", False):
            self._encoder_of = first.encoder_of
            groups = [[encoder] for encoder in first.encoders]
        else:
            groups = [[parts[name] for name in names]]
        self._folders = [
            folder / f"text-{digest([VERSION, [_hash_encoder(e) for e in group], settings])}"
            for group in groups
        ]
        self._rows = [list(captions[n : n + SHARD]) for n in range(0, len(captions), SHARD)]
        self._names = [f"{digest(chunk)}.safetensors" for chunk in self._rows]
        self._place_of = {
            caption: (number, row)
            for number, chunk in enumerate(self._rows)
            for row, caption in enumerate(chunk)
        }
        self._shards = Shards()

    def build(self, rank: int = 0, num_processes: int = 1) -> Iterator[CacheProgress]:
        """Encode the missing shards, which several processes share in turn."""
        total = sum(len(chunk) for chunk in self._rows)
        done = 0
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
        for number, chunk in enumerate(self._rows):
            missing = [n for n in range(len(self._folders)) if not self._place(n, number).exists()]
            if number % num_processes == rank and missing:
                parts = self._encode(chunk)
                for n in missing:
                    write_shard(self._place(n, number), parts[n], chunk)
            done += len(chunk)
            yield CacheProgress("encode captions", done, total)

    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The cached result of `encode_captions`."""
        parts = [
            [self._read(n, caption) for caption in captions] for n in range(len(self._folders))
        ]
        stacked = [
            {name: torch.stack([row[name] for row in rows]) for name in rows[0]} for rows in parts
        ]
        if self._encoder_of is None:
            return stacked[0]
        return {
            name: torch.cat([stacked[n][name] for n in self._encoder_of], dim=-1)
            for name in stacked[0]
        }

    def _read(self, encoder: int, caption: str) -> dict[str, Tensor]:
        number, row = self._place_of[caption]
        return self._shards.row(self._place(encoder, number), row)

    def _place(self, encoder: int, number: int) -> Path:
        return self._folders[encoder] / self._names[number]

    def _encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """The tensors of each folder by name, with one row per caption."""
        batches = [captions[n : n + BATCH] for n in range(0, len(captions), BATCH)]
        with torch.no_grad():
            encoded = [encode_captions(self._pipeline, batch) for batch in batches]
        whole = {name: torch.cat([e[name].cpu() for e in encoded]) for name in encoded[0]}
        if self._encoder_of is None:
            return [whole]
        owners = [self._encoder_of.index(n) for n in range(len(self._folders))]
        count = len(self._encoder_of)
        return [
            {name: t.chunk(count, dim=-1)[owner].contiguous() for name, t in whole.items()}
            for owner in owners
        ]


def _hash_encoder(encoder: Any) -> list[Any]:
    """Hashes of everything that determines the output of a text encoder, or an ensemble's."""
    if isinstance(encoder, PromptEncoder):
        configurations = [configuration_of(each) for each in encoder.encoders]
        return [hash_weights(encoder), configurations, encoder.described, str(encoder.dtype)]
    if not isinstance(encoder, EnsembleTextEncoder):
        return [hash_weights(encoder), configuration_of(encoder), str(encoder.dtype)]
    hashes = [[hash_weights(e), configuration_of(e)] for e in encoder.encoders]
    if encoder.is_joined:
        hashes = [hashes[n] for n in encoder.encoder_of]
    return [*hashes, str(encoder.dtype)]


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of everything that determines the tokens of a text."""
    if isinstance(tokenizer, PromptTokenizer):
        every = json.dumps([hash_tokenizer(each) for each in tokenizer.tokenizers])
        return hashlib.sha256(every.encode()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model: Any = tokenizer.get_vocab()
    else:
        model = json.loads(backend.to_str())
        # every call sets these anew
        model.pop("truncation", None), model.pop("padding", None)
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    content = [type(tokenizer).__name__, model, tokenizer.model_max_length, ids, sides]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
