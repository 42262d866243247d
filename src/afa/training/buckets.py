"""Aspect-ratio buckets: the sizes to which training pictures are scaled and cropped.

The sizes are those of kohya's trainers: both sides are multiples of a step, and no size has more
pixels than the square of the resolution. A picture gets the size of which it loses least.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field

from afa.errors import AfaError
from afa.reading import counted
from afa.recipe import Section

if TYPE_CHECKING:
    from collections.abc import Iterable


#: width and height in pixels
Size = tuple[int, int]
_STEP = 64  # kohya's `bucket_reso_steps`
#: a loss of area that is mentioned, on average, and the one from which pictures are counted
_MENTIONED, _MUCH = 0.01, 0.25


class BucketsRecipe(Section):
    """Aspect-ratio buckets: pictures keep their shape instead of becoming squares.

    `buckets: true` uses the defaults. The sizes are those of kohya's trainers: multiples of `step`
    from `min_size` to `max_size`, with at most as many pixels as the square of `data.resolution`.

    Attributes:
        min_size: shortest side in pixels; None uses half the resolution (`min_bucket_reso`).
        max_size: longest side in pixels; None uses twice the resolution, or what the experts
            support if that is less (`max_bucket_reso`).
        step: sides are multiples of it; None uses 64, or an eighth of a smaller resolution, rounded
            up to what the experts need (`bucket_reso_steps`).
        no_upscale: whether small pictures keep their size, and are cropped to multiples of `step`
            (`bucket_no_upscale`).
    """

    min_size: int | None = Field(default=None, ge=8)
    max_size: int | None = Field(default=None, ge=8)
    step: int | None = Field(default=None, ge=1)
    no_upscale: bool = False


@dataclass(frozen=True)
class Buckets:
    """The sizes of training pictures.

    Attributes:
        resolution: no size has more pixels than its square.
        min_size: the shortest side in pixels.
        max_size: the longest side in pixels.
        step: sides are multiples of it.
        no_upscale: whether smaller pictures are not enlarged but cropped to the next multiples of
            `step`, whatever `min_size` is.
    """

    resolution: int
    min_size: int
    max_size: int
    step: int
    no_upscale: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes for pictures that may be scaled, in ascending order."""
        step, area = self.step, self.resolution**2
        square = self.resolution // step * step
        found = {(square, square)}
        for width in range(-(-self.min_size // step) * step, self.max_size + 1, step):
            height = min(self.max_size, area // width) // step * step
            if height >= self.min_size:
                found |= {(width, height), (height, width)}
        return tuple(sorted(found))

    def of(self, size: Size) -> Size:
        """The bucket of a picture of this size: the one of which scaling and cropping loses least.

        Of several, the one with most pixels.
        """
        width, height = size
        sizes = self.sizes
        if self.keeps(size):
            return width // self.step * self.step, height // self.step * self.step
        if self.no_upscale:
            sizes = tuple(s for s in sizes if s[0] <= width and s[1] <= height) or sizes
        return min(sizes, key=lambda s: (_distance(s, size), -s[0] * s[1], s))

    def keeps(self, size: Size) -> bool:
        """Whether a picture of this size is cropped without being scaled."""
        is_small = size[0] * size[1] <= self.resolution**2 and max(size) <= self.max_size
        return self.no_upscale and is_small and min(size) >= self.step


def _distance(bucket: Size, size: Size) -> float:
    """The logarithm of the picture's area divided by the area that a crop of this shape keeps."""
    return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0])))


def size_text(size: Size) -> str:
    """Format a width and a height: "768x320"."""
    return f"{size[0]}x{size[1]}"


def share_lost(target: Size, size: Size) -> float:
    """The share of a picture's area that is cut off if it is scaled and cropped to a target."""
    return 1 - math.exp(-_distance(target, size))


def crop_lines(sizes: Iterable[Size]) -> list[str]:
    """A warning for square crops if these pictures lose a part of their area."""
    lost = [share_lost((1, 1), size) for size in sizes]
    if not lost or statistics.fmean(lost) < _MENTIONED:
        return []
    much = sum(share > _MUCH for share in lost)
    return [
        f"Square crops cut off {statistics.fmean(lost):.0%} of the pictures' area on average; "
        f"{much} of {counted(len(lost), 'picture')} {'loses' if much == 1 else 'lose'} more than a "
        "quarter. Set data.buckets: true to train on pictures of their own shape."
    ]


def buckets_of(
    asked: BucketsRecipe, resolution: int, multiple: int, largest: int | None = None
) -> Buckets:
    """Return the buckets of a recipe for some experts.

    Args:
        asked: the section `data.buckets`.
        resolution: the resolution in pixels.
        multiple: sides must be multiples of it; see `afa.loading.task.size_multiple`.
        largest: the longest side that the experts support; None for no limit.

    Raises:
        AfaError: if a setting does not fit the experts or the others.
    """
    step = asked.step
    if step is None:
        step = -(-max(min(_STEP, resolution // 8), 1) // multiple) * multiple
    if step % multiple or step > resolution:
        raise AfaError(
            "AFA-TRAIN-080",
            f"data.buckets.step is {step}; it must be a multiple of {multiple} for these experts, "
            f"and at most data.resolution, {resolution}. Change it, or remove it to use the "
            "default.",
        )
    min_size = asked.min_size or max(resolution // 2, step)
    max_size = asked.max_size or min(2 * resolution, largest or 2 * resolution)
    if not step <= min_size <= resolution:
        raise AfaError(
            "AFA-TRAIN-081",
            f"data.buckets.min_size is {min_size}; it must be at least the step, {step}, and at "
            f"most data.resolution, {resolution}. Change one of them.",
        )
    if max_size < resolution:
        raise AfaError(
            "AFA-TRAIN-082",
            f"data.buckets.max_size is {max_size}; it must be at least data.resolution, "
            f"{resolution}. Raise it, or lower data.resolution.",
        )
    require_side(max_size, largest, "data.buckets.max_size")
    return Buckets(resolution, min_size, max_size, step, asked.no_upscale)


def require_side(side: int, largest: int | None, name: str = "data.resolution") -> None:
    """Refuse pictures with a longer side than the experts' position embeddings cover.

    Raises:
        AfaError: if it is longer.
    """
    if largest is not None and side > largest:
        raise AfaError(
            "AFA-TRAIN-083",
            f"{name} is {side}; the position embeddings of these experts cover pictures of at most "
            f"{largest} pixels a side. Lower it to {largest} or less.",
        )
