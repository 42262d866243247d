"""Training batches, encoded from pictures and captions on demand."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.reading import BrokenSample, Tally
from afa.training.buckets import size_text
from afa.training.data.images import sample_of
from afa.training.encoding import as_batch, encode_captions, encode_pictures, latent_shape
from afa.training.order import Draw, Purpose, draw_at, rows_of, sample_at, successors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.reading import Conversion
    from afa.training.buckets import Size
    from afa.training.data import CaptionedImages
    from afa.training.encoding import Batch, Encoded
    from afa.training.grouping import Grouping
    from afa.training.transform import Transform


#: seconds in which a DataLoader worker must return a batch
_TIMEOUT = 1800
#: bytes of a socket's path (sun_path of unix(7), of macOS), and of what multiprocessing appends
_MAX_SOCKET = 103 if sys.platform == "darwin" else 107
_SOCKET = len("/pymp-abcdefgh/listener-abcdefgh")


class Examples(Protocol):
    """A source of training batches."""

    @property
    def broken(self) -> Broken:
        """The broken pictures found so far."""

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Yield one batch per row of places; its content depends only on the places."""

    def rows(self, count: int, size: int) -> Sequence[Sequence[int]]:
        """Divide the first `count` places into rows of at most `size`, each of one shape."""

    def notes(self, *, is_last: bool) -> list[str]:
        """Messages for the user about the batches since the last call, one line each."""


class Broken:
    """Collects broken pictures and raises if there are too many.

    Args:
        num_samples: size of the data set; None if it is unknown, which disables the limit.
        share: maximum fraction of broken samples.
    """

    def __init__(self, num_samples: int | None, share: float) -> None:
        self._num_samples, self._share = num_samples, share
        #: sample -> error message, which names the file
        self.found: dict[int, str] = {}

    def note(self, found: dict[int, str]) -> list[str]:
        """Record broken pictures; returns the messages of the new ones.

        Raises:
            AfaError: if too many are broken.
        """
        new = {sample: message for sample, message in found.items() if sample not in self.found}
        self.found |= new
        count = self._num_samples
        if new and count is not None and len(self.found) > self._share * count:
            raise AfaError(
                "AFA-TRAIN-031",
                f"{len(self.found)} of {count} pictures are broken; at most {self._share:.1%} may "
                f"be. The last one: {list(new.values())[-1]} Repair the pictures, or raise "
                "data.max_broken.",
            )
        return list(new.values())


class Sample(NamedTuple):
    """A transformed picture with its caption.

    Attributes:
        pixels: [3, H, W] in -1..1.
        sizes: see `Transform.sizes`.
        caption: the one that is used.
        number: index in the data set.
        conversions: conversions that were applied to the picture.
        broken: the broken samples that this one replaces -> error message.
    """

    pixels: Tensor
    sizes: Tensor
    caption: str
    number: int
    conversions: frozenset[Conversion]
    broken: dict[int, str]


@dataclass(frozen=True)
class Order:
    """Maps places to samples and random draws.

    Attributes:
        samples: the indices that are used.
        seed: seed of the order and of all random draws.
        caption_dropout: fraction of captions that are dropped.
        shape: of the latents [C, H, W] without a grouping.
        purpose: training or validation.
        grouping: the samples by bucket; None without buckets.
    """

    samples: Sequence[int]
    seed: int
    caption_dropout: float
    shape: tuple[int, int, int]
    purpose: Purpose = Purpose.TRAINING
    grouping: Grouping | None = None

    def candidates(self, place: int) -> Iterator[int]:
        """The sample at a place, then its replacements in case it is broken."""
        if self.grouping is not None:
            if self.purpose is Purpose.VALIDATION:
                return self.grouping.candidates_in_order(place)
            return self.grouping.candidates(place, self.seed)
        position = place
        if self.purpose is not Purpose.VALIDATION:
            position = sample_at(place, len(self.samples), self.seed)
        return successors(position, self.samples)

    def rows(self, count: int, size: int) -> Sequence[Sequence[int]]:
        """See `Examples.rows`."""
        return rows_of(count, size) if self.grouping is None else self.grouping.rows(count, size)

    def draw(self, place: int, sample: int | None = None) -> Draw:
        """The random numbers of a place, and noise of the shape of a sample's latent.

        What selects the crop, the timestep and dropped captions does not depend on the sample; what
        is drawn after the noise does, such as one of several captions.
        """
        shape = self.shape
        if self.grouping is not None and sample is not None:
            shape = self.grouping.shape(sample)
        return draw_at(place, shape, self.seed, self.purpose)

    def require_bucket(self, sample: int, target: Size, name: str) -> None:
        """Check that a picture still belongs to the bucket that its sample has.

        Raises:
            AfaError: if it does not.
        """
        if self.grouping is not None and self.grouping.target(sample) != target:
            raise AfaError(
                "AFA-TRAIN-084",
                f"The picture '{name}' belongs to the bucket {size_text(target)}, but its size "
                f"placed it in {size_text(self.grouping.target(sample))} when the training "
                "started. Do not change pictures meanwhile. Run the same command again.",
            )

    def drops(self, draw: Draw) -> bool:
        """Whether the caption is dropped."""
        return draw.caption < self.caption_dropout


class _Places(Dataset):
    """Samples by place, for a DataLoader with or without workers."""

    def __init__(self, data: CaptionedImages, transform: Transform, order: Order) -> None:
        self._data, self._transform, self._order = data, transform, order

    def __getitem__(self, place: int) -> Sample | AfaError:
        """The sample of a place; if it is broken, the next readable one.

        Returns errors instead of raising them, because a worker wraps raised errors in a traceback.
        """
        draw = self._order.draw(place)
        variant = self._transform.variant(draw.variant)
        broken: dict[int, str] = {}
        for index in self._order.candidates(place):
            try:
                picture, captions = sample_of(self._data, index)
                target = self._transform.target(picture.size)
                self._order.require_bucket(index, target, self._data.name(index))
                pixels = self._transform(picture, index, variant)
                sizes = self._transform.sizes(picture.size, index, variant)
                conversions = self._transform.conversions(picture)
                caption = self._order.draw(place, index).one_of(captions)
                return Sample(pixels, sizes, caption, index, conversions, broken)
            except BrokenSample as error:
                broken[index] = str(error)
            except AfaError as error:
                return error
        return AfaError(
            "AFA-TRAIN-032", f"All pictures are broken. The last error: {broken[index]}"
        )


def _require_sockets() -> None:
    """Check that DataLoader workers can create sockets in the temporary folder.

    If the socket's path is too long for the system, torch loses the batch and waits forever.

    Raises:
        AfaError: if the path is too long.
    """
    place = tempfile.gettempdir()
    if not hasattr(socket, "AF_UNIX"):  # Windows, where torch needs none
        return
    if len(os.fsencode(place)) + _SOCKET > _MAX_SOCKET:
        raise AfaError(
            "AFA-TRAIN-033",
            f"The path of the temporary folder '{place}' is too long for data.num_workers; at most "
            f"{_MAX_SOCKET - _SOCKET} bytes are allowed. Set TMPDIR to a shorter path.",
        )


@contextmanager
def readers_alive() -> Iterator[None]:
    """Convert torch's errors about DataLoader workers; a dead worker interrupts any code by signal.

    Raises:
        AfaError: if a worker was killed or timed out.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" in str(error):
            raise AfaError(
                "AFA-TRAIN-034",
                f"The processes that read pictures returned no batch within {_TIMEOUT} seconds. "
                "Check that the disk is available. Set data.num_workers: 0 to see the error of a "
                "read. Run the same command to resume.",
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise AfaError(
            "AFA-TRAIN-035",
            "A process that reads pictures was killed, most often because memory ran out. Lower "
            "data.num_workers, and run the same command to resume.",
        ) from error


class LiveExamples:
    """Reads, transforms and encodes pictures on demand.

    Args:
        pipeline: its autoencoder and text encoders encode the samples.
        data: pictures and captions.
        transform: crops and flips.
        seed: seed of the order and of all random draws.
        samples: indices of the samples to use; None uses all.
        caption_dropout: fraction of captions that are dropped.
        max_broken: maximum fraction of broken pictures.
        num_workers: number of processes that read pictures ahead.
        device: device of the batches; None uses the denoiser's.
        trains_text: whether text embeddings carry gradients.
        purpose: training or validation.
        tally: counts conversions; training and validation may share one.
        grouping: the samples by bucket, for a transform with buckets.
        broken: broken samples that are known already -> error message.

    Raises:
        AfaError: if too many pictures are broken.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        data: CaptionedImages,
        transform: Transform,
        *,
        seed: int,
        samples: Sequence[int] | None = None,
        caption_dropout: float = 0.0,
        max_broken: float = 0.0,
        num_workers: int = 0,
        device: torch.device | None = None,
        trains_text: bool = False,
        purpose: Purpose = Purpose.TRAINING,
        tally: Tally | None = None,
        grouping: Grouping | None = None,
        broken: dict[int, str] | None = None,
    ) -> None:
        self._pipeline, self._data, self._transform = pipeline, data, transform
        self._device = device or denoiser_of(pipeline).device
        self._num_workers, self._trains_text = num_workers, trains_text
        shape = latent_shape(pipeline, transform.resolution)
        samples = range(len(data)) if samples is None else samples
        self._order = Order(samples, seed, caption_dropout, shape, purpose, grouping)
        self.broken = Broken(len(data), max_broken)
        self.broken.note(broken or {})
        self._tally = Tally() if tally is None else tally
        self._news: list[str] = []

    def rows(self, count: int, size: int) -> Sequence[Sequence[int]]:
        """See `Examples.rows`."""
        return self._order.rows(count, size)

    def notes(self, *, is_last: bool) -> list[str]:
        """The first picture of each kind of conversion, and the counts at the end."""
        notes, self._news = self._news, []
        line = self._tally.line() if is_last else None
        return [*notes, line] if line else notes

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Encoded]:
        """See `Examples.batches`."""
        rows = list(places)
        if self._num_workers:
            _require_sockets()
        loader = DataLoader(
            _Places(self._data, self._transform, self._order),
            batch_sampler=cast("Any", rows),  # torch accepts any sequences
            num_workers=self._num_workers,
            collate_fn=list,
            timeout=_TIMEOUT if self._num_workers else 0,
        )
        with readers_alive():
            for row, read in zip(rows, loader, strict=True):
                yield self._encode(row, read)

    def _encode(self, places: Sequence[int], read: Sequence[Sample | AfaError]) -> Encoded:
        samples: list[Sample] = []
        for sample in read:
            if isinstance(sample, AfaError):
                raise sample
            self.broken.note(sample.broken)
            for conversion in self._tally.add(sample.number, sample.conversions):
                name = self._data.name(sample.number)
                self._news.append(f"'{name}' is the first picture {conversion.said}.")
            samples.append(sample)
        draws = [
            self._order.draw(place, sample.number)
            for place, sample in zip(places, samples, strict=True)
        ]
        captions = [
            "" if self._order.drops(draw) else sample.caption
            for draw, sample in zip(draws, samples, strict=True)
        ]
        posterior = encode_pictures(self._pipeline, torch.stack([s.pixels for s in samples]))
        with torch.set_grad_enabled(self._trains_text):
            conditions = encode_captions(self._pipeline, captions)
        conditions["sizes"] = torch.stack([s.sizes for s in samples])
        return as_batch(posterior, conditions, draws, self._pipeline.vae, self._device)
