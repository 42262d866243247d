"""AES: the LAION aesthetic predictor, linear layers on CLIP's image embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from afa.errors import AfaError
from afa.machine.damaged import Unreadable
from afa.metrics.pictures import require_partners
from afa.metrics.weights import Lacking, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image
    from torch import Tensor, nn

    from afa.metrics.clip import ClipEncoder
    from afa.metrics.weights import Source

AESTHETIC_FILES = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
)


class AestheticScorer:
    """How much people like a picture, about 1 to 10 (Schuhmann, 2022); the prompt plays no part.

    Linear layers without activations on the unit-length embedding of CLIP ViT-L/14.
    https://github.com/christophschuhmann/improved-aesthetic-predictor
    """

    name = "aes"
    higher_is_better = True

    def __init__(self, encoder: ClipEncoder, head: nn.Sequential) -> None:
        self.encoder = encoder
        self.head = head

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The score of every picture; of the prompts only the number is looked at.

        Raises:
            AfaError: no pictures, or another number of prompts.
        """
        require_partners(pictures, prompts)
        embeddings = F.normalize(self.encoder.features(pictures))
        return [self.head(embedding).item() for embedding in embeddings]


def load_aesthetic(source: Source, encoder: ClipEncoder) -> AestheticScorer:
    """The predictor from its published file, `.pth` or safetensors.

    Raises:
        AfaError: nothing is there, a pickle that is not allowed, an incomplete file, or one made
            for embeddings of another width.
    """
    file = source.file(AESTHETIC_FILES)
    with source.reading():
        head = linear_head(source.tensors(file), "layers.")
    width, seen = encoder.model.config.projection_dim, head[0].in_features
    if width != seen:
        raise AfaError(
            "AFA-METRIC-001",
            f"The metric 'aes' needs a CLIP with embeddings of {seen} numbers, '{encoder.name}' "
            f"has {width}. Name the one that the predictor was trained on as clip.",
        )
    return AestheticScorer(encoder, head)


def linear_head(tensors: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    """Linear layers, one after the other, from `{prefix}{n}.weight` and `.bias`.

    The numbers have gaps, where dropout stood in training. ImageReward ends in such layers too.

    Raises:
        Lacking: a weight or a bias is missing.
        Unreadable: layers without a number, or weights that are no matrices.
    """
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    if not numbers:
        raise Lacking(f"{prefix}0.weight")
    odd = next((number for number in sorted(numbers) if not number.isdecimal()), None)
    if odd is not None:
        raise Unreadable(f"'{prefix}{odd[:80]}' is a layer without a number")
    head = torch.nn.Sequential()
    for number in sorted(numbers, key=int):
        width, seen = shape_of(tensors, f"{prefix}{number}.weight", 2)
        shape_of(tensors, f"{prefix}{number}.bias", 1)
        layer = torch.nn.utils.skip_init(torch.nn.Linear, seen, width)
        layer.load_state_dict(
            {part: tensors[f"{prefix}{number}.{part}"] for part in ("weight", "bias")}
        )
        head.append(layer)
    return head.requires_grad_(False)
