"""Judges of emoji scenes: whether the correct objects are on the correct sides."""

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
    """How one picture matches its prompt, according to the classifier.

    `left`, `right` and `both`: the correct object is on that side, or on both. `objects`: both
    objects are there, on either side.
    """

    left: bool
    right: bool
    both: bool
    objects: bool


def load_classifier(folder: Path | None = None) -> ObjectClassifier:
    """Load the object classifier: the bundled one, or one from a folder of `afa zoo build`."""
    classifier = ObjectClassifier()
    tensors = load_file((folder or assets() / "judges") / "classifier.safetensors")
    classifier.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def judge(
    classifier: ObjectClassifier, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> list[Verdict]:
    """Compare every picture with its caption.

    Args:
        classifier: from `load_classifier`.
        pictures: RGB pictures of 64x64 pixels.
        captions: one per picture, in the form of `Scene.caption`.

    Raises:
        AfaError: if a picture has another size, or a caption is not in that form.
    """
    verdicts = []
    for picture, caption in zip(pictures, captions, strict=True):
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise AfaError(
                "AFA-ZOO-003",
                f"A judged picture must be {IMAGE_SIZE}x{IMAGE_SIZE} pixels; got {picture.size}. "
                "Judge pictures of the zoo's models.",
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
    """The quality of the bundled experts and judges, measured when they were built."""
    return json.loads((assets() / "report.json").read_text(encoding="utf-8"))
