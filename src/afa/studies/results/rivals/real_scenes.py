"""Real scenes through the autoencoder: the score of the judge itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image

from afa.evaluation.cost import Cost
from afa.loading.pipeline import load_single
from afa.studies.results.rivals.rival import Drawer, Rival
from afa.studies.results.rows import REAL
from afa.training.encoding import encode_pictures
from afa.training.transform import Transform
from afa.zoo.scenes import parse_caption

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RealScenes(Rival):
    """The scene that each prompt describes, encoded and decoded: the best that a model can draw."""

    row: ClassVar[str] = REAL

    def open(self) -> Drawer:
        """See `Rival.open`."""
        return _Rendered(self)


class _Rendered(Drawer):
    def __init__(self, asked: RealScenes) -> None:
        self._pipeline = load_single(asked.place.base)[0]

    @torch.no_grad()
    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """See `Drawer.draw`."""
        del seed  # a caption has one scene
        began = time.perf_counter()
        scenes = [Image.fromarray(parse_caption(caption).render()) for caption in captions]
        transform = Transform(scenes[0].width)
        pixels = torch.stack(
            [transform(scene, n, 0) for scene, n in zip(scenes, numbers, strict=True)]
        )
        latents = encode_pictures(self._pipeline, pixels).mean
        shown = self._pipeline.vae.decode(latents).sample
        pictures = self._pipeline.image_processor.postprocess(shown)
        return pictures, Cost(time.perf_counter() - began, None, 0, "")
