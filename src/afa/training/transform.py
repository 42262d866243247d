"""Crops and flips of training pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from afa.reading import Conversion, conversions_of, scale_and_crop
from afa.training.order import Purpose, generator_of

if TYPE_CHECKING:
    from torch import Tensor

    from afa.training.buckets import Buckets, Size


@dataclass(frozen=True)
class Transform:
    """Scale the shorter side, crop a square, flip.

    As in the published training, but with Lanczos resampling. Each variant of a sample has a fixed
    crop and flip, so that it can be encoded once.

    Attributes:
        resolution: side of the square in pixels.
        crop: a random square, or the central one.
        flip: whether each variant is mirrored with probability 0.5.
        num_variants: number of variants per sample.
        seed: seed of the crops and flips.
    """

    resolution: int
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    num_variants: int = 4
    seed: int = 0

    def target(self, size: Size) -> Size:
        """Width and height of the training picture of a picture of this size."""
        del size
        return self.resolution, self.resolution

    def num_distinct(self, size: Size) -> int:
        """The maximum number of different variants of a picture of this size."""
        can_move = self.crop == "random" and self.scaled(size) != self.target(size)
        return self.num_variants if can_move or self.flip else 1

    def conversions(self, picture: Image.Image) -> frozenset[Conversion]:
        """The conversions of a picture, including enlargement; see `afa.reading`."""
        is_small = self.enlarges(picture.size)
        return conversions_of(picture) | ({Conversion.ENLARGED} if is_small else frozenset())

    def share_lost(self, size: Size) -> float:
        """The share of the area of a picture of this size that the crop cuts off."""
        (width, height), target = self.scaled(size), self.target(size)
        return 1 - target[0] * target[1] / (width * height)

    def enlarges(self, size: Size) -> bool:
        """Whether a picture of this size is enlarged."""
        width, height = self.target(size)
        return size[0] < width or size[1] < height

    def variant(self, drawn: float) -> int:
        """The index of the variant for a random number from 0 to 1."""
        return int(drawn * self.num_variants)

    def __call__(self, picture: Image.Image, sample: int, variant: int) -> Tensor:
        """The pixels [3, H, W] in -1..1 of one variant of a sample."""
        scaled, target = self.scaled(picture.size), self.target(picture.size)
        left, top, mirrored = self._place(scaled, target, sample, variant)
        crop = left, top, left + target[0], top + target[1]
        picture = scale_and_crop(picture, scaled, crop, Image.Resampling.LANCZOS)
        if mirrored:
            picture = ImageOps.mirror(picture)
        array = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
        return torch.from_numpy(array).permute(2, 0, 1)

    def sizes(self, size: Size, sample: int, variant: int) -> Tensor:
        """Size conditioning of Stable Diffusion XL (Podell et al., 2023, section 2.2).

        Args:
            size: width and height of the original picture.
            sample: index of the sample.
            variant: index of the variant.

        Returns: [6]: original height and width, top and left of the crop in the scaled picture,
            height and width of the crop.
        """
        width, height = size
        across, down = target = self.target(size)
        left, top, _ = self._place(self.scaled(size), target, sample, variant)
        return torch.tensor([height, width, top, left, down, across]).float()

    def _place(
        self, scaled: Size, target: Size, sample: int, variant: int
    ) -> tuple[int, int, bool]:
        """Left and top of the crop, and whether it is mirrored."""
        generator = generator_of(self.seed, Purpose.TRANSFORM, sample, variant)
        across, down, mirror = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if self.crop == "center":
            across = down = 0.5
        left = int(across * (scaled[0] - target[0] + 1))
        top = int(down * (scaled[1] - target[1] + 1))
        return left, top, self.flip and mirror < 0.5

    def scaled(self, size: Size) -> Size:
        """Width and height of the complete picture, scaled so that it covers the target."""
        target = self.target(size)
        scale = max(side / length for side, length in zip(target, size, strict=True))
        width, height = (
            max(side, round(length * scale)) for side, length in zip(target, size, strict=True)
        )
        return width, height


@dataclass(frozen=True)
class BucketTransform(Transform):
    """Scale a picture so that it covers its bucket, crop the bucket, flip; see `Transform`.

    Attributes:
        buckets: the sizes of training pictures.
    """

    buckets: Buckets = field(kw_only=True)

    def target(self, size: Size) -> Size:
        """See `Transform.target`."""
        return self.buckets.of(size)

    def scaled(self, size: Size) -> Size:
        """See `Transform.scaled`."""
        return size if self.buckets.keeps(size) else super().scaled(size)
