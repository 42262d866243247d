"""AFA Weights: pictures of who did what."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch.nn import functional as F

from afa.drawing.plots import filmstrip, tint
from afa.ensemble.protocol import expert_names
from afa.errors import AfaError

from ..ensemble import runner_of
from ..errors import codes_shown

if TYPE_CHECKING:
    from torch import Tensor

    from afa.ensemble.recording import WeightRecord


#: the side of the pictures of the steps
_SIDE = 512


class AfaWeights(io.ComfyNode):
    """Show the fusion weights of sampled pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaWeights",
            display_name="AFA Weights",
            category="afa",
            description=(
                "Shows which expert drew what: a figure over the steps, and each step over the "
                "picture. Switch on record_weights in the node that made the MODEL."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler got."),
                io.Latent.Input("latent", tooltip="The LATENT that the sampler returned."),
                io.Image.Input("images", tooltip="The decoded pictures."),
            ],
            outputs=[
                io.Image.Output("figure", display_name="figure"),
                io.Image.Output("steps", display_name="steps"),
            ],
        )

    @classmethod
    @codes_shown()
    def execute(cls, model: Any, latent: Any, images: Tensor) -> io.NodeOutput:
        """See ComfyUI."""
        runner = runner_of(model)
        record = runner.recording.of(latent["samples"])
        pictures = [_picture(image) for image in images]
        if len(pictures) != len(latent["samples"]):
            raise AfaError(
                "AFA-COMFY-026",
                f"The {len(pictures)} images must be the decoded latents, which are "
                f"{len(latent['samples'])}. Connect VAE Decode with the same LATENT.",
            )
        names = expert_names(runner.denoiser)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.png"
            filmstrip(record, pictures, path, experts=names)
            with Image.open(path) as figure:
                shown = _tensor(figure.convert("RGB"))
        return io.NodeOutput(shown[None], steps_over(record, pictures))


def steps_over(record: WeightRecord, pictures: list[Image.Image]) -> Tensor:
    """The weights of every step over every picture, [S * B, H, W, 3]; step by step.

    Height and width are at most 512.
    """
    shown, pictures = [], [_smaller(picture) for picture in pictures]
    for step in record.steps:
        size = max(w.shape[-2:] for w in step.weights.values())
        maps = [
            F.interpolate(step.weights[site].float(), size, mode="bilinear", align_corners=False)
            for site in record.places
        ]
        mean = torch.stack(maps).mean(0)
        shown += [_tensor(tint(p, own)) for p, own in zip(pictures, mean, strict=True)]
    return torch.stack(shown)


def _smaller(picture: Image.Image) -> Image.Image:
    """At most `_SIDE` pixels wide and high: there is one picture for every step."""
    copy = picture.copy()
    copy.thumbnail((_SIDE, _SIDE))
    return copy


def _picture(image: Tensor) -> Image.Image:
    pixels = (255 * image.cpu().clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255
