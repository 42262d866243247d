"""Crops and flips of training pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from afa.reading import Conversion, conversions_of, scale_and_crop
from afa.training.order import Purpose, generator_of

if TYPE_CHECKING:
    from torch import Tensor


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

    def num_distinct(self, size: tuple[int, int]) -> int:
        """The maximum number of different variants of a picture of this size."""
        can_move = self.crop == "random" and self._scaled(size) != (self.resolution,) * 2
        return self.num_variants if can_move or self.flip else 1

    def conversions(self, picture: Image.Image) -> frozenset[Conversion]:
        """The conversions of a picture, including enlargement; see `afa.reading`."""
        is_small = min(picture.size) < self.resolution
        return conversions_of(picture) | ({Conversion.ENLARGED} if is_small else frozenset())

    def variant(self, drawn: float) -> int:
        """The index of the variant for a random number from 0 to 1."""
        return int(drawn * self.num_variants)

    def __call__(self, picture: Image.Image, sample: int, variant: int) -> Tensor:
        """The pixels [3, R, R] in -1..1 of one variant of a sample."""
        side = self.resolution
        scaled = self._scaled(picture.size)
        left, top, mirrored = self._place(scaled, sample, variant)
        square = left, top, left + side, top + side
        picture = scale_and_crop(picture, scaled, square, Image.Resampling.LANCZOS)
        if mirrored:
            picture = ImageOps.mirror(picture)
        array = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
        return torch.from_numpy(array).permute(2, 0, 1)

    def sizes(self, size: tuple[int, int], sample: int, variant: int) -> Tensor:
        """Size conditioning of Stable Diffusion XL (Podell et al., 2023, section 2.2).

        Args:
            size: width and height of the original picture.
            sample: index of the sample.
            variant: index of the variant.

        Returns: [6]: original height and width, top and left of the crop in the scaled picture,
            height and width of the square.
        """
        width, height = size
        left, top, _ = self._place(self._scaled(size), sample, variant)
        return torch.tensor([height, width, top, left, self.resolution, self.resolution]).float()

    def _place(self, scaled: tuple[int, int], sample: int, variant: int) -> tuple[int, int, bool]:
        """Left and top of the crop, and whether it is mirrored."""
        generator = generator_of(self.seed, Purpose.TRANSFORM, sample, variant)
        across, down, mirror = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if self.crop == "center":
            across = down = 0.5
        width, height = scaled
        left = int(across * (width - self.resolution + 1))
        top = int(down * (height - self.resolution + 1))
        return left, top, self.flip and mirror < 0.5

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = self.resolution / min(size)
        width, height = (max(self.resolution, round(length * scale)) for length in size)
        return width, height
