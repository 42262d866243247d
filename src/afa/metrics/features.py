"""Feature extractors: Inception, vision transformers and the zoo's classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from afa.errors import AfaError
from afa.metrics.pictures import Preprocessing, one_by_one
from afa.metrics.weights import MODEL_FILES, PROCESSOR_ADVICE, Source, describe
from afa.reading import as_rgb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from torch import Tensor

    from afa.zoo.models import ObjectClassifier

INCEPTION = "inception"
ZOO_CLASSIFIER = "zoo:classifier"
InceptionLayer = Literal["2048", "logits_unbiased"]
_INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth",)


@dataclass(frozen=True)
class NetworkFeatures:
    """A feature extractor; `embed` computes the features [d] of one picture."""

    name: str
    embed: Callable[[Image.Image], Tensor]

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute features [n, d], float32 on the CPU.

        Raises:
            AfaError: if there are no pictures.
        """
        return one_by_one(pictures, self.embed)


def load_inception(
    source: Source,
    layer: InceptionLayer,
    device: torch.device | str,
) -> NetworkFeatures:
    """Load Inception v3 of torch-fidelity (Obukhov, 2020), with which FID, KID and IS are defined.

    `2048` is the pooled layer [2048], for FID and KID; `logits_unbiased` are the class logits
    [1008], for IS. torch-fidelity downloads the weights, unless `source` is a local file of them.
    https://github.com/toshas/torch-fidelity

    Raises:
        AfaError: if torch-fidelity, torchvision or the weights are missing.
    """
    weights = None
    if source.name != INCEPTION:
        file = source.file(_INCEPTION_FILES)
        source.tensors(file)  # raises if it contains anything except tensors
        weights = str(file)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise AfaError(
            "AFA-METRIC-010",
            f"{source.what} are those of the Inception network, which requires torch-fidelity and "
            f"torchvision ({error}). Run: pip install 'afa[inception]' - or set weights to another "
            "network, such as openai/clip-vit-large-patch14.",
        ) from error
    with source.loading():
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=weights
        )
    network.to(device)

    def embed(picture: Image.Image) -> Tensor:
        levels = torch.from_numpy(np.array(as_rgb(picture))).permute(2, 0, 1)[None]
        return network(levels.to(device))[0][0]  # the network resizes the picture

    return NetworkFeatures(f"{source.name}({layer})", embed)


def load_vision(
    source: Source, processor: Source | None, device: torch.device | str
) -> NetworkFeatures:
    """Load a vision transformer such as DINOv2 (Oquab et al., 2024); features are the class token.

    https://arxiv.org/abs/2304.07193

    Args:
        source: a model of transformers as safetensors, a folder or a hub id.
        processor: folder of `preprocessor_config.json`; None uses the model's.
        device: device of the model.

    Raises:
        AfaError: if the model or `preprocessor_config.json` is missing, or the model is incomplete.
    """
    from transformers import AutoModel

    folder = source.locate([*MODEL_FILES, "preprocessor_config.json"])
    names = ["preprocessor_config.json"]
    parts, parts_folder = source, folder
    if processor is not None:
        parts, parts_folder = processor, processor.locate(names)
    preprocessing = Preprocessing.read(parts.part(parts_folder, names, PROCESSOR_ADVICE))
    model = source.model(AutoModel, folder).to(device)

    def embed(picture: Image.Image) -> Tensor:
        return model(preprocessing.pixels(picture)[None].to(device)).last_hidden_state[0, 0]

    return NetworkFeatures(f"vision({describe(source, processor)})", embed)


def classifier_logits(classifier: ObjectClassifier, device: torch.device | str) -> NetworkFeatures:
    """The logits [2 * 49] of the zoo's object classifier for both halves of a 64x64 scene.

    Computing features raises AfaError if a picture has another size.
    """
    from afa.zoo.scenes import IMAGE_SIZE

    classifier.to(device)
    preprocessing = Preprocessing(crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)

    def classify(picture: Image.Image) -> Tensor:
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise AfaError(
                "AFA-METRIC-011",
                f"'{ZOO_CLASSIFIER}' requires pictures of {IMAGE_SIZE}x{IMAGE_SIZE} pixels; got "
                f"{picture.size}. Use it on scenes of the zoo only.",
            )
        halves = torch.stack(preprocessing.pixels(picture).split(IMAGE_SIZE // 2, dim=-1))
        return classifier(halves.to(device)).flatten()

    return NetworkFeatures(ZOO_CLASSIFIER, classify)
