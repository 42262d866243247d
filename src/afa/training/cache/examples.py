"""Training batches from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.training.encoding import as_batch, latent_shape
from afa.training.examples import Broken, Order

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffusers import DiffusionPipeline

    from afa.training.cache.latents import LatentShards
    from afa.training.cache.text import TextCache
    from afa.training.encoding import Encoded
    from afa.training.grouping import Grouping
    from afa.training.order import Purpose
    from afa.training.transform import Transform


class CachedExamples:
    """Batches from the cache, equal to those of `LiveExamples` up to rounding.

    Build both caches first: `LatentCache.build()`, then `TextCache.build()` for
    `LatentShards.captions`.

    Args:
        pipeline: only its configuration is used.
        latents: all shards.
        text: cache of all captions of the latents, and the empty one.
        transform: transform of the latents.
        seed: seed of the order and of all random draws.
        samples: indices of the samples to use; None uses all.
        caption_dropout: fraction of captions that are dropped.
        max_broken: maximum fraction of broken pictures.
        device: device of the batches.
        purpose: training or validation.
        grouping: the samples by bucket, for a transform with buckets.

    Raises:
        AfaError: if too many pictures are broken.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        latents: LatentShards,
        text: TextCache,
        transform: Transform,
        *,
        seed: int,
        samples: Sequence[int] | None = None,
        caption_dropout: float = 0.0,
        max_broken: float = 0.0,
        device: torch.device,
        purpose: Purpose,
        grouping: Grouping | None = None,
    ) -> None:
        self._latents, self._text, self._transform = latents, text, transform
        self._vae, self._device = pipeline.vae, device
        shape = latent_shape(pipeline, transform.resolution)
        samples = range(latents.num_samples) if samples is None else samples
        self._order = Order(samples, seed, caption_dropout, shape, purpose, grouping)
        self.broken = Broken(latents.num_samples, max_broken)
        self.broken.note(latents.broken)

    def rows(self, count: int, size: int) -> Sequence[Sequence[int]]:
        """See `Examples.rows`."""
        return self._order.rows(count, size)

    def notes(self, *, is_last: bool) -> list[str]:
        """No messages: building the cache reports conversions."""
        del is_last
        return []

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Encoded]:
        """See `Examples.batches`."""
        for row in places:
            samples = [self._latents.first_whole(self._order.candidates(place)) for place in row]
            draws = [
                self._order.draw(place, sample) for place, sample in zip(row, samples, strict=True)
            ]
            posterior = self._latents.posterior(
                samples, [self._transform.variant(draw.variant) for draw in draws]
            )
            captions = [
                "" if self._order.drops(draw) else draw.one_of(self._latents.captions_of(sample))
                for draw, sample in zip(draws, samples, strict=True)
            ]
            conditions = self._text.conditions(captions)
            conditions["sizes"] = torch.stack(
                [
                    self._transform.sizes(
                        self._latents.size(sample), sample, self._transform.variant(draw.variant)
                    )
                    for draw, sample in zip(draws, samples, strict=True)
                ]
            )
            yield as_batch(posterior, conditions, draws, self._vae, self._device)
