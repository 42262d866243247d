"""The order of samples that are grouped by the size of their pictures.

Each optimizer step uses the pictures of one bucket. So every division of a step into batches and
processes has the same samples, and every batch has one shape. A bucket is used in as many steps as
it has samples, divided by the samples of a step. What remains of a bucket in an epoch is used in
the next one: no sample is left out of a step, and none is repeated to fill one.
"""

from __future__ import annotations

import bisect
import statistics
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from afa.errors import AfaError
from afa.reading import counted
from afa.training.buckets import size_text
from afa.training.encoding import latent_shape
from afa.training.order import sample_at, successors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from afa.training.buckets import Size
    from afa.training.transform import BucketTransform, Transform


_MAX_LISTED = 8  # buckets in a message


class _Turn(NamedTuple):
    """The use of a bucket in a step.

    Attributes:
        bucket: its number.
        earlier: in how many earlier steps it was used.
    """

    bucket: int
    earlier: int


class Grouping:
    """Samples by bucket.

    Args:
        targets: sample -> width and height of its training picture; samples whose pictures have no
            readable size are absent.
        samples: the samples that are used, of which at least one is in `targets`.
        per_step: number of samples in an optimizer step.
        shapes: width and height -> shape [C, H, W] of the latent.

    Raises:
        AfaError: if no sample has a size.
    """

    def __init__(
        self,
        targets: Mapping[int, Size],
        samples: Sequence[int],
        per_step: int,
        shapes: Mapping[Size, tuple[int, int, int]],
    ) -> None:
        if not any(sample in targets for sample in samples):
            raise AfaError(
                "AFA-TRAIN-085",
                f"None of {counted(len(samples), 'picture')} has a readable size, which "
                "data.buckets needs. Repair or replace them.",
            )
        self._targets, self._samples, self._per_step = targets, samples, per_step
        self._shapes = shapes
        members: dict[Size, list[int]] = {}
        for sample in samples:
            if sample in targets:
                members.setdefault(targets[sample], []).append(sample)
        #: the samples of each bucket, in the order of `samples`
        self.members = dict(sorted(members.items()))
        self._buckets = list(self.members)
        self._counts = tuple(len(some) for some in self.members.values())

    def target(self, sample: int) -> Size:
        """Width and height of a sample's training picture."""
        return self._targets[sample]

    def shape(self, sample: int) -> tuple[int, int, int]:
        """The shape [C, H, W] of a sample's latent."""
        return self._shapes[self._targets[sample]]

    def candidates(self, place: int, seed: int) -> Iterator[int]:
        """The sample at a place of a training, then its replacements in case it is broken.

        If all pictures of a bucket are broken, all samples of the step are from the next bucket.
        """
        step, slot = divmod(place, self._per_step)
        turn = _turn_at(step, self._counts, self._per_step, seed)
        own = self.members[self._buckets[turn.bucket]]
        position = turn.earlier * self._per_step + slot
        return self._from(turn.bucket, sample_at(position, len(own), seed, turn.bucket + 1))

    def candidates_in_order(self, place: int) -> Iterator[int]:
        """The sample at a place of the validation, then its replacements of the same bucket."""
        first = next(n for n in successors(place, self._samples) if n in self._targets)
        bucket = self._buckets.index(self._targets[first])
        return self._from(bucket, self.members[self._buckets[bucket]].index(first))

    def _from(self, bucket: int, position: int) -> Iterator[int]:
        """Yield the samples of a bucket from a position, then those of the other buckets."""
        yield from successors(position, self.members[self._buckets[bucket]])
        for other in (*self._buckets[bucket + 1 :], *self._buckets[:bucket]):
            yield from self.members[other]

    def rows(self, count: int, size: int) -> list[list[int]]:
        """Divide the first places of the validation into batches, each of one bucket."""
        places: dict[Size, list[int]] = {}
        for place in range(count):
            places.setdefault(self._targets[next(self.candidates_in_order(place))], []).append(
                place
            )
        return [
            some[n : n + size]
            for _, some in sorted(places.items())
            for n in range(0, len(some), size)
        ]

    def summary(self, transform: Transform, sizes: Mapping[int, Size]) -> str:
        """Describe the buckets on one line; `sizes` are width and height of each picture."""
        used = [sample for some in self.members.values() for sample in some]
        lost = statistics.fmean(transform.share_lost(sizes[sample]) for sample in used)
        counts = {bucket: len(some) for bucket, some in self.members.items()}
        return f"Buckets: {_listed(counts)}; crops cut off {lost:.0%} of the area on average."

    def warnings(self, num_steps: int, seed: int) -> list[str]:
        """Warnings about buckets with few pictures, for a training of this length."""
        counts, lines = {bucket: len(some) for bucket, some in self.members.items()}, []
        small = {bucket: count for bucket, count in counts.items() if count < self._per_step}
        if small:
            lines.append(
                f"{counted(len(small), 'bucket')} {'has' if len(small) == 1 else 'have'} "
                f"fewer pictures than a step has samples ({self._per_step}), so a step repeats "
                f"pictures: {_listed(small)}. Raise data.buckets.step, or lower "
                "training.batch_size."
            )
        if unused := self.unused(num_steps, seed):
            lines.append(
                f"No step of this training uses the pictures of {_listed(unused)}: its "
                f"{counted(num_steps, 'step')} of {self._per_step} samples are too few. Raise "
                "training.num_steps or data.buckets.step."
            )
        return lines

    def unused(self, num_steps: int, seed: int) -> dict[Size, int]:
        """The buckets that no step of a training of this length uses, with their samples."""
        counts, per_step = self._counts, self._per_step
        epoch = _epoch_at(num_steps, counts, per_step)
        before = [_steps_until(epoch, count, per_step) for count in counts]
        last = _buckets_of_epoch(epoch, counts, per_step, seed)[: num_steps - sum(before)]
        return {
            bucket: counts[n]
            for n, bucket in enumerate(self._buckets)
            if not before[n] and n not in last
        }


def _listed(counts: Mapping[Size, int]) -> str:
    """Format numbers of pictures by bucket, the largest ones first: "12 of 768x320"."""
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{count} of {size_text(size)}" for size, count in found[:_MAX_LISTED])
    rest = found[_MAX_LISTED:]
    if not rest:
        return text
    return f"{text}, {sum(n for _, n in rest)} of {counted(len(rest), 'other size')}"


def _steps_until(epoch: int, count: int, per_step: int) -> int:
    """In how many steps a bucket is used before an epoch: its samples of a step, rounded."""
    return (2 * epoch * count + per_step) // (2 * per_step)


def _epoch_at(step: int, counts: tuple[int, ...], per_step: int) -> int:
    """The epoch of a step."""

    def total(epoch: int) -> int:
        return sum(_steps_until(epoch + 1, count, per_step) for count in counts)

    # rounding takes at most half a step from each bucket
    most = (step + len(counts) + 2) * per_step
    return bisect.bisect_right(range(most), step, key=total)


@lru_cache(maxsize=4096)
def _turn_at(step: int, counts: tuple[int, ...], per_step: int, seed: int) -> _Turn:
    """The bucket of a step."""
    epoch = _epoch_at(step, counts, per_step)
    before = [_steps_until(epoch, count, per_step) for count in counts]
    buckets = _buckets_of_epoch(epoch, counts, per_step, seed)
    position = step - sum(before)
    bucket = int(buckets[position])
    return _Turn(bucket, before[bucket] + int((buckets[:position] == bucket).sum()))


@lru_cache(maxsize=4)
def _buckets_of_epoch(
    epoch: int, counts: tuple[int, ...], per_step: int, seed: int
) -> NDArray[np.int64]:
    """The buckets of the steps of an epoch, in a random order."""
    steps = [
        _steps_until(epoch + 1, count, per_step) - _steps_until(epoch, count, per_step)
        for count in counts
    ]
    return np.random.default_rng([seed, epoch, 0, 1]).permutation(
        np.repeat(np.arange(len(counts)), steps)
    )


def grouped_by(
    transform: BucketTransform,
    pipeline: DiffusionPipeline,
    sizes: Mapping[int, Size],
    samples: Sequence[int],
    per_step: int,
) -> Grouping:
    """Group samples by the buckets of their pictures.

    Args:
        transform: of the pictures.
        pipeline: its autoencoder determines the shapes of latents.
        sizes: sample -> width and height of its picture.
        samples: the samples that are used.
        per_step: number of samples in an optimizer step.

    Raises:
        AfaError: if no sample has a size.
    """
    targets = {sample: transform.target(size) for sample, size in sizes.items()}
    shapes = {
        (width, height): latent_shape(pipeline, height, width)
        for width, height in set(targets.values())
    }
    return Grouping(targets, samples, per_step, shapes)
