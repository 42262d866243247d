"""Pictures as a network wants them: resized, cropped, normalised, one at a time."""

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
    """From a picture to pixels [3, H, W], as `preprocessor_config.json` describes it.

    Done with Pillow, whose bicubic filter is the one that CLIP was trained with; the processors of
    transformers want torchvision in some of its releases. Sizes are (height, width).
    """

    crop: tuple[int, int] | None  # None: no crop
    shortest_edge: int | None = None  # resize to this, or to `size`, or not at all
    size: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def square(cls, size: int) -> Preprocessing:
        """CLIP's own, for a network that sees `size` by `size` pixels."""
        return cls(crop=(size, size), shortest_edge=size)

    @classmethod
    def read(cls, file: Path) -> Preprocessing:
        """Read a `preprocessor_config.json`.

        Raises:
            AfaError: no such file, or one that describes something else.
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
                f"'{file}' must describe an image processor, but reading it says "
                f"{type(error).__name__}: {error}. Download it again.",
            ) from error

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of what every picture becomes; None where it depends on the picture."""
        return self.crop or self.size

    def pixels(self, picture: Image.Image) -> Tensor:
        """Pixels [3, H, W], float32, of a picture in any mode; see `afa.reading.as_rgb`.

        Raises:
            BrokenPicture: its values cannot be understood.
        """
        picture = as_rgb(picture)
        scaled = picture.size
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(picture.size)
            # the shorter side exactly, the longer one rounded down, as in transformers
            width, height = (
                self.shortest_edge if side == min(picture.size) else int(side * scale)
                for side in picture.size
            )
            scaled = width, height
        elif self.size is not None:
            scaled = self.size[1], self.size[0]
        if self.crop is None:
            picture = picture.resize(scaled, self.resample)
        else:
            left, top = (scaled[0] - self.crop[1]) // 2, (scaled[1] - self.crop[0]) // 2
            middle = left, top, left + self.crop[1], top + self.crop[0]
            picture = scale_and_crop(picture, scaled, middle, self.resample)
        levels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (levels * self.scale - mean) / std


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size that is a number, a mapping or nothing."""
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    return int(size["height"]), int(size["width"])


@torch.no_grad()
def one_by_one(items: Sequence[Any], embed: Callable[[Any], Tensor]) -> Tensor:
    """`embed` of every item, each by itself: [items, width], float32 on the CPU.

    By itself, since a matrix product's last digits change with the size of the batch: this way a
    picture's numbers do not depend on its neighbours.

    Raises:
        AfaError: there are none.
    """
    if len(items) == 0:
        raise AfaError(
            "AFA-METRIC-015", "Features need at least one picture, came none. Draw some first."
        )
    return torch.stack([embed(item).float().cpu() for item in items])


def require_partners(pictures: Sequence[Any], prompts: Sequence[str]) -> None:
    """Refuse a score where pictures and prompts do not pair up.

    Raises:
        AfaError: another number of prompts than of pictures.
    """
    if len(pictures) != len(prompts):
        raise AfaError(
            "AFA-METRIC-016",
            f"Every picture needs its own prompt, came {len(pictures)} pictures and "
            f"{len(prompts)} prompts. Give one prompt for each.",
        )
