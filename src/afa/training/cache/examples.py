"""Batches for the loss, from the cache."""

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
    from afa.training.order import Purpose
    from afa.training.transform import Transform


class CachedExamples:
    """Batches from a cache; the same as `LiveExamples` makes, up to rounding.

    Build both caches first: `latents.build()`, then `text.build()` of the captions that
    `cached_captions` finds.

    Args:
        pipeline: only its configuration is used.
        latents: with all its shards.
        text: with all captions of the latents, and the empty one.
        transform: of the latents.
        seed: of the order and of all that is drawn.
        samples: which of the cache's samples are used; None is all.
        caption_dropout: share of captions that are dropped.
        max_broken: share of broken pictures that is borne.
        device: where batches go.
        purpose: what is drawn for.

    Raises:
        AfaError: too many broken pictures.
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
    ) -> None:
        self._latents, self._text, self._transform = latents, text, transform
        self._vae, self._device = pipeline.vae, device
        shape = latent_shape(pipeline, transform.resolution)
        samples = range(latents.num_samples) if samples is None else samples
        self._order = Order(samples, seed, caption_dropout, shape, purpose)
        self.broken = Broken(latents.num_samples, max_broken)
        self.broken.note(latents.broken)

    def notes(self, *, is_last: bool) -> list[str]:
        """Nothing: what was converted is said when the cache is built."""
        del is_last
        return []

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Encoded]:
        """See `Examples.batches`."""
        for row in places:
            draws = [self._order.draw(place) for place in row]
            samples = [self._latents.first_whole(self._order.candidates(place)) for place in row]
            posterior = self._latents.posterior(
                samples, [self._transform.variant(draw.variant) for draw in draws]
            )
            captions = [
                "" if self._order.drops(draw) else self._latents.caption(sample)
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
