"""Disk cache of latents and text embeddings.

The cache has two kinds of folders, named after a hash of all inputs of their content: `latents-...`
for data, transform and autoencoder; `text-...` for a text encoder and its tokenizer. Both contain
safetensors shards, which are written atomically, so an interrupted pass resumes. A changed expert,
picture or transform has another hash and is encoded again. The cache can be deleted at any time.
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
