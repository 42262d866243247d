"""Preprocess pictures for a network: resize, crop, normalize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from afa.errors import AfaError
from afa.files import read_json
from afa.reading import as_rgb, scale_and_crop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Converts a picture to pixels [3, H, W] as `preprocessor_config.json` describes.

    Uses Pillow, whose bicubic filter CLIP was trained with; some versions of transformers require
    torchvision for their processors. Sizes are (height, width).
    """

    crop: tuple[int, int] | None  # None: no crop
    shortest_edge: int | None = None  # resize to this, or to `size`, or not at all
    size: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rounds: bool = False  # the margin of the crop, as in torchvision; transformers rounds it down

    @classmethod
    def square(cls, size: int) -> Preprocessing:
        """The preprocessing of CLIP by torchvision, for an input of `size` by `size` pixels."""
        return cls(crop=(size, size), shortest_edge=size, rounds=True)

    @classmethod
    def read(cls, file: Path) -> Preprocessing:
        """Read a `preprocessor_config.json`.

        Raises:
            AfaError: if the file is missing or does not describe an image processor.
        """
        settings = read_json(file)
        try:
            size = settings["size"] if settings.get("do_resize", True) else None
            crop = settings["crop_size"] if settings.get("do_center_crop", False) else None
            edge = size if isinstance(size, int) else size and size.get("shortest_edge")
            normalises = settings.get("do_normalize", True)
            rescales = settings.get("do_rescale", True)
            return cls(
                crop=_pair(crop),
                shortest_edge=edge,
                size=None if edge is not None else _pair(size),
                resample=Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)),
                scale=settings.get("rescale_factor", 1 / 255) if rescales else 1.0,
                mean=tuple(settings["image_mean"]) if normalises else (0.0,) * 3,
                std=tuple(settings["image_std"]) if normalises else (1.0,) * 3,
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise AfaError(
                "AFA-METRIC-014",
                f"'{file}' does not describe an image processor ({type(error).__name__}: {error}). "
                "Download it again.",
            ) from error

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of the pixels; None if it depends on the picture."""
        return self.crop or self.size

    def pixels(self, picture: Image.Image) -> Tensor:
        """Convert a picture of any mode to pixels [3, H, W], float32; see `afa.reading.as_rgb`.

        Raises:
            BrokenPicture: if its values cannot be converted.
        """
        picture = as_rgb(picture)
        scaled = picture.size
        if self.shortest_edge is not None:
            # as in transformers and torchvision: the longer side is rounded down, from the exact
            # quotient (640 x 720 to 224 x 252; the factor 0.35 would give 251)
            short = min(picture.size)
            width, height = (self.shortest_edge * side // short for side in picture.size)
            scaled = width, height
        elif self.size is not None:
            scaled = self.size[1], self.size[0]
        if self.crop is None:
            picture = picture.resize(scaled, self.resample)
        else:
            margins = scaled[0] - self.crop[1], scaled[1] - self.crop[0]
            left, top = (round(each / 2) if self.rounds else each // 2 for each in margins)
            middle = left, top, left + self.crop[1], top + self.crop[0]
            picture = scale_and_crop(picture, scaled, middle, self.resample)
        levels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (levels * self.scale - mean) / std


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size, which is a number, a mapping or None."""
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    return int(size["height"]), int(size["width"])


@torch.no_grad()
def one_by_one(items: Sequence[Any], embed: Callable[[Any], Tensor]) -> Tensor:
    """Embed items one at a time; returns [items, width], float32 on the CPU.

    The last digits of a matrix product change with the batch size. One at a time, the features of a
    picture do not depend on the others.

    Raises:
        AfaError: if there are no items.
    """
    if len(items) == 0:
        raise AfaError(
            "AFA-METRIC-015", "Features require at least one picture; got none. Draw some first."
        )
    return torch.stack([embed(item).float().cpu() for item in items])


def require_partners(pictures: Sequence[Any], prompts: Sequence[str]) -> None:
    """Require one prompt per picture.

    Raises:
        AfaError: if the numbers of pictures and prompts differ.
    """
    if len(pictures) != len(prompts):
        raise AfaError(
            "AFA-METRIC-016",
            f"Scores require one prompt per picture; got {len(pictures)} pictures and "
            f"{len(prompts)} prompts.",
        )
