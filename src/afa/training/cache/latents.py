"""Disk cache of the autoencoder's posteriors of a data set."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from afa.ensemble.text import configuration_of, hash_weights
from afa.errors import AfaError
from afa.provenance import releases
from afa.reading import BrokenSample, Conversion, Tally
from afa.training.cache.files import (
    BATCH,
    SHARD,
    VERSION,
    CacheProgress,
    Shards,
    digest,
    grouped,
    read_header,
    shard_name,
    write_shard,
)
from afa.training.data import StreamedImages
from afa.training.data.duplicates import look_of
from afa.training.data.images import sample_of
from afa.training.data.sizes import size_of
from afa.training.encoding import Posterior, encode_pictures, latent_shape
from afa.training.examples import Broken
from afa.training.listing import Listing, digest_of, row_of
from afa.training.transform import BucketTransform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from PIL import Image
    from torch import Tensor

    from afa.training.buckets import Size
    from afa.training.data import CaptionedImages, SampleReader
    from afa.training.transform import Transform

    Sampled = Callable[[], tuple[Image.Image, tuple[str, ...]]]
    Reader = Sampled | SampleReader


class LatentCache:
    """The autoencoder's posteriors of all variants of all samples of a data set.

    Args:
        folder: folder of all caches.
        pipeline: its autoencoder encodes the pictures.
        data: pictures and captions.
        transform: crops and flips.
        content: `afa.training.listing.digest_of` the data; None computes it.
    """

    def __init__(
        self,
        folder: Path,
        pipeline: DiffusionPipeline,
        data: CaptionedImages | StreamedImages,
        transform: Transform,
        content: str | None = None,
    ) -> None:
        self._pipeline, self._data, self._transform = pipeline, data, transform
        self._has_buckets = isinstance(transform, BucketTransform)
        self._count = None if isinstance(data, StreamedImages) else len(data)
        self._key: dict[str, Any] = {
            "version": VERSION,
            "data": data.fingerprint,
            "transform": asdict(transform),
            "autoencoder": [hash_weights(pipeline.vae), configuration_of(pipeline.vae)],
            "dtype": str(pipeline.vae.dtype),
            "releases": releases("torch", "diffusers", "pillow"),
        }
        if not isinstance(data, StreamedImages):  # a stream is read only once, by build()
            self._key["content"] = content or digest_of(data)
        self.folder = folder / f"latents-{digest(self._key)}"

    def build(
        self, rank: int = 0, num_processes: int = 1, max_broken: float = 1.0
    ) -> Iterator[CacheProgress]:
        """Encode the missing shards, which several processes share in turn.

        Raises:
            AfaError: if the disk has too little space, or more than the fraction `max_broken` of
                the pictures is broken; encoded shards are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._count is not None:
            self._require_room(self._count)
        readers, done = self._readers(), 0
        broken = Broken(self._count, max_broken)
        for number in itertools.count():
            chunk = list(itertools.islice(readers, SHARD))
            if not chunk:
                break
            place = self.folder / shard_name(number)
            is_mine = number % num_processes == rank
            if is_mine and not place.exists():
                self._write(place, number * SHARD, chunk)
            done += len(chunk)
            messages = broken.note(_broken_in(read_header(place))) if is_mine else []
            notes = tuple(f"Skipped: {line}" for line in messages)
            yield CacheProgress("encode pictures", done, self._count, notes)

    def shards(self) -> list[Path]:
        """The files of all shards that are built."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def group_of(self, size: Size) -> str:
        """The group of tensors in a shard that have a picture of this size; see `Shards.row`."""
        return grouped("", self._transform.target(size)) if self._has_buckets else ""

    def _readers(self) -> Iterator[Reader]:
        """Readers of all samples in order."""
        data = self._data
        if isinstance(data, StreamedImages):
            return iter(data)
        return (partial(sample_of, data, n) for n in range(len(data)))

    def _require_room(self, count: int) -> None:
        have = sum(place.stat().st_size for place in self.folder.glob("*.safetensors"))
        shape = latent_shape(self._pipeline, self._transform.resolution)
        per_variant = 2 * torch.Size(shape).numel() * self._pipeline.vae.dtype.itemsize
        needed = count * self._transform.num_variants * per_variant - have
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise AfaError(
                "AFA-TRAIN-001",
                f"The disk of '{self.folder}' has {free / 1e9:.1f} GB free; the latents of {count} "
                f"pictures need {needed / 1e9:.1f} GB more. Set another data.cache_folder, or pass "
                "--no-cache.",
            )

    def _write(self, place: Path, first: int, readers: Sequence[Reader]) -> None:
        """Encode the samples of one shard; broken ones are skipped and named in its header."""
        square = (self._transform.resolution,) * 2
        # width and height -> its posteriors, and its pixels that are not encoded yet
        encoded: dict[Size, list[Posterior]] = {} if self._has_buckets else {square: []}
        pixels: dict[Size, list[Tensor]] = {}
        samples: list[int] = []
        captions: list[str] = []
        others: dict[int, tuple[str, ...]] = {}
        looks: dict[int, str] = {}
        sizes: list[tuple[int, int]] = []
        counts: list[int] = []
        broken: dict[int, str] = {}
        broken_sizes: dict[int, Size] = {}
        rows: list[list[str]] = []
        converted: dict[int, list[str]] = {}
        for sample, read in enumerate(readers, start=first):
            if isinstance(self._data, StreamedImages):
                reader = cast("SampleReader", read)
                rows.append([part.hex() for part in row_of(reader.stored())])
                stored, read = reader.stored, reader.sample
            else:
                stored = partial(self._data.stored, sample)
            try:
                picture, (caption, *more) = cast("Sampled", read)()
            except BrokenSample as error:
                broken[sample] = str(error)
                size = size_of(stored(), cast("Sampled", read)) if self._has_buckets else None
                if isinstance(size, tuple):
                    broken_sizes[sample] = size
                continue
            samples.append(sample)
            captions.append(caption)
            looks[sample] = look_of(picture)
            if more:
                others[sample] = tuple(more)
            if conversions := self._transform.conversions(picture):
                converted[sample] = sorted(conversions)
            sizes.append(picture.size)
            counts.append(self._transform.num_distinct(picture.size))
            target = self._transform.target(picture.size)
            waiting = pixels.setdefault(target, [])
            for variant in range(counts[-1]):
                waiting.append(self._transform(picture, sample, variant))
            if len(waiting) >= BATCH:
                done = encode_pictures(self._pipeline, torch.stack(pixels.pop(target)))
                encoded.setdefault(target, []).append(done)
        for target, waiting in pixels.items():
            if waiting:
                done = encode_pictures(self._pipeline, torch.stack(waiting))
                encoded.setdefault(target, []).append(done)
        tensors: dict[str, Tensor] = {}
        for (width, height), parts in sorted(encoded.items()):
            shape = latent_shape(self._pipeline, height, width)
            empty = torch.empty(0, *shape, dtype=self._pipeline.vae.dtype)
            for name in Posterior._fields:
                named = grouped(name, (width, height)) if self._has_buckets else name
                tensors[named] = torch.cat([empty, *(getattr(part, name).cpu() for part in parts)])
        meta = {
            "num_samples": len(readers),
            "samples": samples,
            "captions": captions,
            "others": others,
            "looks": looks,
            "sizes": sizes,
            "num_variants": counts,
            "broken": broken,
            "rows": rows,
            "converted": converted,
        }
        if self._has_buckets:
            meta["broken_sizes"] = broken_sizes
        write_shard(place, tensors, meta)


def _broken_in(header: dict[str, Any]) -> dict[int, str]:
    return {int(sample): message for sample, message in header["broken"].items()}


class LatentShards:
    """The shards of a `LatentCache` that is built.

    Args:
        cache: the cache.

    Raises:
        AfaError: if all pictures are broken, or there are none.
    """

    def __init__(self, cache: LatentCache) -> None:
        self.num_samples = 0
        #: sample -> error message
        self.broken: dict[int, str] = {}
        #: conversions that were applied to the pictures
        self.tally = Tally()
        rows: list[tuple[bytes, bytes, bytes]] = []
        # sample -> its shard, its first row there, its number of variants, its group of tensors
        self._place_of: dict[int, tuple[Path, int, int, str]] = {}
        self._shards = Shards()
        self._captions: dict[int, tuple[str, ...]] = {}
        #: how each picture looks, see `look_of`; shards of earlier releases lack it
        self.looks: dict[int, str] = {}
        self._sizes: dict[int, Size] = {}
        self._broken_sizes: dict[int, Size] = {}
        for place in cache.shards():
            meta = read_header(place)
            self.num_samples += meta["num_samples"]
            self.broken |= _broken_in(meta)
            for row_as_hex in meta["rows"]:
                picture, words, mark = map(bytes.fromhex, row_as_hex)
                rows.append((picture, words, mark))
            for number, done in meta["converted"].items():
                self.tally.add(int(number), map(Conversion, done))
            self.looks |= {int(n): look for n, look in meta.get("looks", {}).items()}
            others = {int(n): texts for n, texts in meta.get("others", {}).items()}
            for number, size in meta.get("broken_sizes", {}).items():
                self._broken_sizes[int(number)] = tuple(size)
            next_row: Counter[str] = Counter()
            for sample, caption, size, count in zip(
                *(meta[key] for key in ("samples", "captions", "sizes", "num_variants")),
                strict=True,
            ):
                group = cache.group_of(tuple(size))
                self._place_of[sample] = place, next_row[group], count, group
                self._captions[sample] = (caption, *others.get(sample, ()))
                self._sizes[sample] = tuple(size)
                next_row[group] += count
        #: listing of a stream; empty for other data, which are listed before
        self.listing = Listing.of(rows)
        if not self._place_of:
            raise AfaError(
                "AFA-TRAIN-002",
                f"All {self.num_samples} samples of the data are broken; at least one must have a "
                "readable picture and a caption. Repair or replace them.",
            )

    @property
    def captions(self) -> list[str]:
        """Each distinct caption, and the empty one, which replaces dropped captions."""
        return list(dict.fromkeys(["", *itertools.chain(*self._captions.values())]))

    @property
    def samples(self) -> list[int]:
        """The samples that are not broken."""
        return list(self._captions)

    def captions_of(self, sample: int) -> tuple[str, ...]:
        """The captions of a sample."""
        return self._captions[sample]

    def size(self, sample: int) -> tuple[int, int]:
        """Width and height of the picture before the transform."""
        return self._sizes[sample]

    @property
    def known_sizes(self) -> dict[int, Size]:
        """Sample -> width and height of its picture, also of broken ones if they state it."""
        return self._sizes | self._broken_sizes

    def first_whole(self, samples: Iterable[int]) -> int:
        """The first of these samples that is not broken.

        Raises:
            AfaError: if all are broken.
        """
        for sample in samples:
            if sample in self._place_of:
                return sample
        raise AfaError(
            "AFA-TRAIN-003",
            "All training pictures, or all held-out pictures, are broken; at least one of each "
            "must be readable. Repair or replace them.",
        )

    def posterior(self, samples: Sequence[int], variants: Sequence[int]) -> Posterior:
        """The posterior [B, C, H, W] of one variant of each sample."""
        means, logvars = [], []
        for sample, variant in zip(samples, variants, strict=True):
            place, row, count, group = self._place_of[sample]
            number = row + min(variant, count - 1)
            read = self._shards.row(place, number, group)
            means.append(read["mean"])
            logvars.append(read["logvar"])
        return Posterior(torch.stack(means), torch.stack(logvars))
