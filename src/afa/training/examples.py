"""Batches for the loss, made from pictures and captions as they are needed."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.reading import BrokenSample, Tally
from afa.training.encoding import as_batch, encode_captions, encode_pictures, latent_shape
from afa.training.order import Draw, Purpose, draw_at, sample_at, successors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.reading import Conversion
    from afa.training.data import CaptionedImages
    from afa.training.encoding import Encoded
    from afa.training.transform import Transform


#: seconds in which a process that reads pictures must have a batch
_PATIENCE = 1800
#: bytes of a socket's path (sun_path of unix(7), with its end), and of what Python puts in a folder
_MAX_SOCKET, _SOCKET = 107, len("/pymp-abcdefgh/listener-abcdefgh")


class Examples(Protocol):
    """Where a training gets its batches."""

    @property
    def broken(self) -> Broken:
        """The broken pictures that were met so far."""

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Encoded]:
        """One batch for each row of places; what it holds depends on the places alone."""

    def notes(self, *, is_last: bool) -> list[str]:
        """What a user should know of the batches since the last call, one line each."""


class Broken:
    """Counts broken pictures and stops where there are too many.

    Args:
        num_samples: of the whole data set; None where only its end will tell, and nothing stops.
        share: of it that may be broken.
    """

    def __init__(self, num_samples: int | None, share: float) -> None:
        self._num_samples, self._share = num_samples, share
        #: sample -> what reading it said, which names the file
        self.found: dict[int, str] = {}

    def note(self, found: dict[int, str]) -> list[str]:
        """Take broken pictures down; returns what is to be said of those that are new.

        Raises:
            AfaError: they are more than the share.
        """
        new = {sample: said for sample, said in found.items() if sample not in self.found}
        self.found |= new
        count = self._num_samples
        if new and count is not None and len(self.found) > self._share * count:
            raise AfaError(
                "AFA-TRAIN-031",
                f"At most {self._share:.1%} of the pictures may be broken, but {len(self.found)} "
                f"of {count} are (last: {list(new.values())[-1]}) Repair the data, or raise "
                "data.max_broken.",
            )
        return list(new.values())


class Sample(NamedTuple):
    """A transformed picture.

    Attributes:
        pixels: [3, R, R] in -1..1.
        sizes: see `Transform.sizes`.
        caption: its own.
        number: its own in the data set.
        conversions: what reading it took.
        broken: the samples that it stands in for, with what reading them said.
    """

    pixels: Tensor
    sizes: Tensor
    caption: str
    number: int
    conversions: frozenset[Conversion]
    broken: dict[int, str]


@dataclass(frozen=True)
class Order:
    """How places become samples and draws; `samples` are those of the data set that are used."""

    samples: Sequence[int]
    seed: int
    caption_dropout: float
    shape: tuple[int, int, int]
    purpose: Purpose = Purpose.TRAINING

    def candidates(self, place: int) -> Iterator[int]:
        """The sample at a place, then those that take its place where it is broken."""
        position = place
        if self.purpose is not Purpose.VALIDATION:
            position = sample_at(place, len(self.samples), self.seed)
        return successors(position, self.samples)

    def draw(self, place: int) -> Draw:
        """What is drawn there."""
        return draw_at(place, self.shape, self.seed, self.purpose)

    def drops(self, draw: Draw) -> bool:
        """Whether the caption is dropped."""
        return draw.caption < self.caption_dropout


class _Places(Dataset):
    """Samples by place, for a loader with or without processes of its own."""

    def __init__(self, data: CaptionedImages, transform: Transform, order: Order) -> None:
        self._data, self._transform, self._order = data, transform, order

    def __getitem__(self, place: int) -> Sample | AfaError:
        """A sample; where it is broken, the next one that is not.

        An error is returned: a loader's process would wrap it into a traceback.
        """
        variant = self._transform.variant(self._order.draw(place).variant)
        broken: dict[int, str] = {}
        for index in self._order.candidates(place):
            try:
                picture, caption = self._data[index]
                pixels = self._transform(picture, index, variant)
                sizes = self._transform.sizes(picture.size, index, variant)
                conversions = self._transform.conversions(picture)
                return Sample(pixels, sizes, caption, index, conversions, broken)
            except BrokenSample as error:
                broken[index] = str(error)
            except AfaError as error:
                return error
        return AfaError(
            "AFA-TRAIN-032", f"The data must hold pictures that can be read: {broken[index]}"
        )


def _require_sockets() -> None:
    """Refuse temporary folders in which processes cannot hand over what they have read.

    They do so by a socket there, whose path may not be longer than the system takes; where it is,
    torch loses what was read, and whoever waits for it waits for ever.

    Raises:
        AfaError: the path is too long.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) + _SOCKET > _MAX_SOCKET:
        raise AfaError(
            "AFA-TRAIN-033",
            f"For data.num_workers the path of the folder for temporary files must have at most "
            f"{_MAX_SOCKET - _SOCKET} bytes, came '{place}'. Set TMPDIR to a shorter one.",
        )


@contextmanager
def readers_alive() -> Iterator[None]:
    """Say in one line what torch says where a process that reads pictures is no more.

    It does so by a signal, in the middle of whatever runs: a step as well as a read.

    Raises:
        AfaError: one of the processes was ended from outside, or says nothing any more.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" in str(error):
            raise AfaError(
                "AFA-TRAIN-034",
                f"The processes that read pictures must have a batch within {_PATIENCE} seconds, "
                "but nothing came. Is the disk there? Set data.num_workers: 0 to see what a read "
                "says; the same command goes on.",
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise AfaError(
            "AFA-TRAIN-035",
            "The processes that read pictures must live as long as the training, but one was "
            "ended, most often for want of memory. Lower data.num_workers; the same command goes "
            "on.",
        ) from error


class LiveExamples:
    """Reads, transforms and encodes pictures when their turn comes.

    Args:
        pipeline: its autoencoder and text encoder encode.
        data: pictures and captions.
        transform: crops and flips.
        seed: of the order and of all that is drawn.
        samples: which of the data set's samples are used; None is all.
        caption_dropout: share of captions that are dropped.
        max_broken: share of broken pictures that is borne.
        num_workers: processes that read pictures ahead.
        device: where batches go.
        trains_text: whether text embeddings carry gradients.
        purpose: what is drawn for.
        tally: counts conversions; one may be shared by training and validation.
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
    ) -> None:
        self._pipeline, self._data, self._transform = pipeline, data, transform
        self._device = device or denoiser_of(pipeline).device
        self._num_workers, self._trains_text = num_workers, trains_text
        shape = latent_shape(pipeline, transform.resolution)
        samples = range(len(data)) if samples is None else samples
        self._order = Order(samples, seed, caption_dropout, shape, purpose)
        self.broken = Broken(len(data), max_broken)
        self._tally = Tally() if tally is None else tally
        self._news: list[str] = []

    def notes(self, *, is_last: bool) -> list[str]:
        """See `Examples.notes`: every kind of conversion once, and at the end how many."""
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
            batch_sampler=cast("Any", rows),  # any sequences will do
            num_workers=self._num_workers,
            collate_fn=list,
            timeout=_PATIENCE if self._num_workers else 0,
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
        draws = [self._order.draw(place) for place in places]
        captions = [
            "" if self._order.drops(draw) else sample.caption
            for draw, sample in zip(draws, samples, strict=True)
        ]
        posterior = encode_pictures(self._pipeline, torch.stack([s.pixels for s in samples]))
        with torch.set_grad_enabled(self._trains_text):
            conditions = encode_captions(self._pipeline, captions)
        conditions["sizes"] = torch.stack([s.sizes for s in samples])
        return as_batch(posterior, conditions, draws, self._pipeline.vae, self._device)
