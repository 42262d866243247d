"""From a picture to the square of pixels that is encoded."""

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

    As in the published training, but scaled with Lanczos's filter. A variant of a sample is always
    the same crop and flip, so that it may be encoded once.

    Attributes:
        resolution: side of the square in pixels.
        crop: a square anywhere, or the middle one.
        flip: whether half of the variants are mirrored.
        num_variants: how many there are of each sample.
        seed: of the crops and flips.
    """

    resolution: int
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    num_variants: int = 4
    seed: int = 0

    def num_distinct(self, size: tuple[int, int]) -> int:
        """How many different variants a picture of this size has at the most."""
        can_move = self.crop == "random" and self._scaled(size) != (self.resolution,) * 2
        return self.num_variants if can_move or self.flip else 1

    def conversions(self, picture: Image.Image) -> frozenset[Conversion]:
        """What it takes to make a picture that was read a square; see `afa.reading`."""
        is_small = min(picture.size) < self.resolution
        return conversions_of(picture) | ({Conversion.ENLARGED} if is_small else frozenset())

    def variant(self, drawn: float) -> int:
        """The variant that a number from 0 to 1 stands for."""
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
        """What Stable Diffusion XL is told of a variant (Podell et al., 2023, section 2.2).

        Args:
            size: width and height of the picture before.
            sample: its number.
            variant: of it.

        Returns: [6]: height and width before, top and left of the crop in the scaled picture,
            height and width of the square.
        """
        width, height = size
        left, top, _ = self._place(self._scaled(size), sample, variant)
        return torch.tensor([height, width, top, left, self.resolution, self.resolution]).float()

    def _place(self, scaled: tuple[int, int], sample: int, variant: int) -> tuple[int, int, bool]:
        """Left and top of the crop, and whether it is mirrored."""
        across, down, mirrored = self._chances(sample, variant)
        width, height = scaled
        left = int(across * (width - self.resolution + 1))
        return left, int(down * (height - self.resolution + 1)), mirrored

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = self.resolution / min(size)
        width, height = (max(self.resolution, round(length * scale)) for length in size)
        return width, height

    def _chances(self, sample: int, variant: int) -> tuple[float, float, bool]:
        """Where the crop is, from 0 to 1 on either axis, and whether it is mirrored."""
        generator = generator_of(self.seed, Purpose.TRANSFORM, sample, variant)
        across, down, mirror = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if self.crop == "center":
            across = down = 0.5
        return across, down, self.flip and mirror < 0.5
