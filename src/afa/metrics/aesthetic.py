"""AES: the LAION aesthetic predictor, linear layers on CLIP image embeddings."""

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
    """Predicts aesthetic ratings of about 1 to 10, independent of the prompt (Schuhmann, 2022).

    Linear layers without activations on the normalized embedding of CLIP ViT-L/14.
    https://github.com/christophschuhmann/improved-aesthetic-predictor
    """

    name = "aes"
    higher_is_better = True

    def __init__(self, encoder: ClipEncoder, head: nn.Sequential) -> None:
        self.encoder = encoder
        self.head = head

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each picture; the prompts have no effect.

        Raises:
            AfaError: if there are no pictures, or the number of prompts differs.
        """
        require_partners(pictures, prompts)
        embeddings = F.normalize(self.encoder.features(pictures))
        return [self.head(embedding).item() for embedding in embeddings]


def load_aesthetic(source: Source, encoder: ClipEncoder) -> AestheticScorer:
    """Load the predictor from its published file, `.pth` or safetensors.

    Raises:
        AfaError: if the file is missing, incomplete or a pickle that is not allowed, or requires
            embeddings of another width.
    """
    file = source.file(AESTHETIC_FILES)
    with source.reading():
        head = linear_head(source.tensors(file), "layers.")
    width, required = encoder.model.config.projection_dim, head[0].in_features
    if width != required:
        raise AfaError(
            "AFA-METRIC-001",
            f"The metric 'aes' requires a CLIP with embeddings of width {required}; "
            f"'{encoder.name}' has {width}. Set clip to the one it was trained on.",
        )
    return AestheticScorer(encoder, head)


def linear_head(tensors: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    """Build a sequence of linear layers from `{prefix}{n}.weight` and `.bias`.

    The numbers `n` have gaps where training had dropout. ImageReward has such a head too.

    Raises:
        Lacking: if a weight or bias is missing.
        Unreadable: if a layer has no number, or a weight is not a matrix.
    """
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    if not numbers:
        raise Lacking(f"{prefix}0.weight")
    wrong = next((number for number in sorted(numbers) if not number.isdecimal()), None)
    if wrong is not None:
        raise Unreadable(f"'{prefix}{wrong[:80]}' is a layer without a number")
    head = torch.nn.Sequential()
    for number in sorted(numbers, key=int):
        out_features, in_features = shape_of(tensors, f"{prefix}{number}.weight", 2)
        shape_of(tensors, f"{prefix}{number}.bias", 1)
        layer = torch.nn.utils.skip_init(torch.nn.Linear, in_features, out_features)
        layer.load_state_dict(
            {part: tensors[f"{prefix}{number}.{part}"] for part in ("weight", "bias")}
        )
        head.append(layer)
    return head.requires_grad_(False)
