"""Judges of emoji scenes: is the right object on the right side?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from afa.errors import AfaError
from afa.reading import as_rgb
from afa.zoo import assets
from afa.zoo.models import ObjectClassifier
from afa.zoo.scenes import IMAGE_SIZE, parse_caption
from afa.zoo.sprites import OBJECTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What the classifier found in one picture, against its own prompt.

    `both`: the right object on the right side, twice. `objects`: both are there, in any order.
    """

    left: bool
    right: bool
    both: bool
    objects: bool


def load_classifier(folder: Path | None = None) -> ObjectClassifier:
    """The object classifier, shipped or from a folder of `afa zoo build`."""
    classifier = ObjectClassifier()
    tensors = load_file((folder or assets() / "judges") / "classifier.safetensors")
    classifier.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def judge(
    classifier: ObjectClassifier, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> list[Verdict]:
    """Compare every picture with its own caption.

    Args:
        classifier: from `load_classifier`.
        pictures: RGB, 64x64.
        captions: one for each, as `Scene.caption` writes them.

    Raises:
        AfaError: pictures of another size, or a caption that is no scene's.
    """
    verdicts = []
    for picture, caption in zip(pictures, captions, strict=True):
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise AfaError(
                "AFA-ZOO-003",
                f"A judged picture must be {IMAGE_SIZE}x{IMAGE_SIZE} pixels, came {picture.size}.",
            )
        truth = parse_caption(caption)
        found = classifier(_halves(picture)).argmax(1).tolist()
        wanted = [OBJECTS.index(truth.left), OBJECTS.index(truth.right)]
        left, right = found[0] == wanted[0], found[1] == wanted[1]
        verdicts.append(Verdict(left, right, left and right, sorted(found) == sorted(wanted)))
    return verdicts


def _halves(picture: Image.Image) -> Tensor:
    array = np.asarray(as_rgb(picture), dtype=np.float32) / 127.5 - 1.0
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    return torch.stack([pixels[..., : IMAGE_SIZE // 2], pixels[..., IMAGE_SIZE // 2 :]])


def report_card() -> dict:
    """How good the shipped experts and judges are, as measured when they were built."""
    return json.loads((assets() / "report.json").read_text())
