"""The text encoders' embeddings of captions, on disk."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from afa.text import hash_weights
from afa.training.cache.files import (
    BATCH,
    SHARD,
    VERSION,
    CacheProgress,
    digest,
    read_row,
    write_shard,
)
from afa.training.encoding import encode_captions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor


class TextCache:
    """The embeddings of captions by every distinct text encoder of an ensemble.

    A caption's embeddings lie in the shard that its row of captions names, so that data sets with
    the same captions share them, and a changed expert has its own part made again, no other's.

    Args:
        folder: of all caches.
        pipeline: its tokenizer and text encoder.
        captions: each once.
    """

    def __init__(
        self, folder: Path, pipeline: StableDiffusionPipeline, captions: Sequence[str]
    ) -> None:
        self._pipeline = pipeline
        encoder = pipeline.text_encoder
        self._encoder_of = getattr(encoder, "encoder_of", [0])
        encoders = getattr(encoder, "encoders", [encoder])
        tokens = hash_tokenizer(pipeline.tokenizer)
        self._folders = [
            folder / f"text-{digest([VERSION, hash_weights(e), str(e.dtype), tokens])}"
            for e in encoders
        ]
        self._rows = [list(captions[n : n + SHARD]) for n in range(0, len(captions), SHARD)]
        self._names = [f"{digest(chunk)}.safetensors" for chunk in self._rows]
        self._place_of = {
            caption: (number, row)
            for number, chunk in enumerate(self._rows)
            for row, caption in enumerate(chunk)
        }

    def build(self, rank: int = 0, num_processes: int = 1) -> Iterator[CacheProgress]:
        """Encode what is not there yet; several processes take a shard each in turn."""
        total = sum(len(chunk) for chunk in self._rows)
        done = 0
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
        for number, chunk in enumerate(self._rows):
            missing = [n for n in range(len(self._folders)) if not self._place(n, number).exists()]
            if number % num_processes == rank and missing:
                parts = self._encode(chunk)
                for n in missing:
                    write_shard(self._place(n, number), {"text": parts[n]}, chunk)
            done += len(chunk)
            yield CacheProgress("encode captions", done, total)

    def embeddings(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, N * D] or [B, L, D], as the pipeline's own text encoder gives them."""
        parts = [
            torch.stack([self._read(n, caption) for caption in captions])
            for n in range(len(self._folders))
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([parts[n] for n in self._encoder_of], dim=-1)

    def _read(self, encoder: int, caption: str) -> Tensor:
        number, row = self._place_of[caption]
        return read_row(self._place(encoder, number), "text", row)

    def _place(self, encoder: int, number: int) -> Path:
        return self._folders[encoder] / self._names[number]

    def _encode(self, captions: Sequence[str]) -> list[Tensor]:
        """The embeddings [n, L, D] of each distinct encoder."""
        batches = [captions[n : n + BATCH] for n in range(0, len(captions), BATCH)]
        with torch.no_grad():
            joined = [encode_captions(self._pipeline, batch).cpu() for batch in batches]
        text = torch.cat(joined)
        if len(self._folders) == 1:
            return [text]
        parts = text.chunk(len(self._encoder_of), dim=-1)
        first = [self._encoder_of.index(n) for n in range(len(self._folders))]
        return [parts[n].contiguous() for n in first]


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of all that decides a text's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    content = [told, tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
