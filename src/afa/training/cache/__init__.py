"""Latents and text embeddings, computed once and kept on disk.

Two kinds of folders lie in the cache, each named after a hash of all that its content depends on:
`latents-...` of data, transform and autoencoder; `text-...` of one text encoder and its tokenizer.
Both hold safetensors shards, each there whole or not at all, so that a pass that was stopped goes
on where it was. A changed expert, picture or transform has another hash and begins anew. Any of it
may be deleted at any time.
"""

from afa.training.cache.examples import CachedExamples
from afa.training.cache.files import CacheProgress, default_cache_folder
from afa.training.cache.latents import LatentCache, LatentShards
from afa.training.cache.text import TextCache

__all__ = [
    "CacheProgress",
    "CachedExamples",
    "LatentCache",
    "LatentShards",
    "TextCache",
    "default_cache_folder",
]
