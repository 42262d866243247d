"""Further feature networks: Inception, any vision transformer, the zoo's classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from afa.errors import AfaError
from afa.metrics.pictures import Preprocessing, one_by_one
from afa.metrics.weights import MODEL_FILES, PROCESSOR_ADVICE, Source, describe
from afa.reading import as_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from afa.zoo.models import ObjectClassifier

INCEPTION = "inception"
ZOO_CLASSIFIER = "zoo:classifier"
InceptionLayer = Literal["2048", "logits_unbiased"]
_INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth",)


class InceptionFeatures:
    """Inception v3 as FID, KID and IS were defined with it, by torch-fidelity (Obukhov, 2020).

    `2048` is the pooled layer, for FID and KID; `logits_unbiased` the classes', for IS.
    https://github.com/toshas/torch-fidelity
    """

    def __init__(self, name: str, network: Any, device: torch.device | str) -> None:
        self.name = name
        self.network = network.to(device)
        self.device = device

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features [n, 2048] or logits [n, 1008], float32 on the CPU.

        Raises:
            AfaError: there are no pictures.
        """
        return one_by_one(pictures, self._embed)

    def _embed(self, picture: Image.Image) -> Tensor:
        levels = torch.from_numpy(np.array(as_rgb(picture))).permute(2, 0, 1)[None]
        return self.network(levels.to(self.device))[0][0]  # the network resizes by itself


def load_inception(
    source: Source,
    layer: InceptionLayer,
    device: torch.device | str,
) -> InceptionFeatures:
    """The network with weights that torch-fidelity downloads, or from a local file of them.

    Raises:
        AfaError: torch-fidelity, torchvision that it needs, or the weights are not there.
    """
    weights = None
    if source.name != INCEPTION:
        file = source.file(_INCEPTION_FILES)
        source.tensors(file)  # torch's restricted unpickler finds nothing but tensors in it
        weights = str(file)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise AfaError(
            "AFA-METRIC-010",
            f"{source.what} are the Inception network's, which needs torch-fidelity and "
            f"torchvision; importing them says {error}. Run: pip install 'afa[inception]' - or "
            "name another network as weights, such as openai/clip-vit-large-patch14.",
        ) from error
    with source.loading():
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=weights
        )
    return InceptionFeatures(f"{source.name}({layer})", network, device)


class VisionFeatures:
    """The class token of a vision transformer such as DINOv2 (Oquab et al., 2024).

    https://arxiv.org/abs/2304.07193
    """

    def __init__(self, name: str, model: Any, preprocessing: Preprocessing) -> None:
        self.name = name
        self.model = model
        self.preprocessing = preprocessing

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features [n, d], float32 on the CPU.

        Raises:
            AfaError: there are no pictures.
        """
        return one_by_one(pictures, self._embed)

    def _embed(self, picture: Image.Image) -> Tensor:
        pixels = self.preprocessing.pixels(picture)[None].to(self.model.device)
        return self.model(pixels).last_hidden_state[0, 0]


def load_vision(
    source: Source, processor: Source | None, device: torch.device | str
) -> VisionFeatures:
    """A vision transformer of transformers from a folder or a hub id.

    Args:
        source: of the model, as safetensors.
        processor: of `preprocessor_config.json`; None: beside the model.
        device: where it computes.

    Raises:
        AfaError: nothing is there, no `preprocessor_config.json`, or an incomplete model.
    """
    from transformers import AutoModel

    folder = source.locate([*MODEL_FILES, "preprocessor_config.json"])
    names = ["preprocessor_config.json"]
    parts, parts_folder = source, folder
    if processor is not None:
        parts, parts_folder = processor, processor.locate(names)
    preprocessing = Preprocessing.read(parts.part(parts_folder, names, PROCESSOR_ADVICE))
    model = source.model(AutoModel, folder)
    return VisionFeatures(f"vision({describe(source, processor)})", model.to(device), preprocessing)


class ClassifierLogits:
    """The zoo's object classifier on both halves of a scene, left and right: [n, 2 * 49]."""

    name = ZOO_CLASSIFIER

    def __init__(self, classifier: ObjectClassifier, device: torch.device | str) -> None:
        self.classifier = classifier.to(device)
        self.device = device

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Logits [n, 2 * 49], float32 on the CPU.

        Raises:
            AfaError: no pictures, or some of another size than 64x64.
        """
        return one_by_one(pictures, self._classify)

    def _classify(self, picture: Image.Image) -> Tensor:
        from afa.zoo.scenes import IMAGE_SIZE

        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise AfaError(
                "AFA-METRIC-011",
                f"'{ZOO_CLASSIFIER}' needs pictures of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, came "
                f"{picture.size}. Use it on scenes of the zoo only.",
            )
        pixels = Preprocessing(crop=None, mean=(0.5,) * 3, std=(0.5,) * 3).pixels(picture)
        halves = torch.stack(pixels.split(IMAGE_SIZE // 2, dim=-1))
        return self.classifier(halves.to(self.device)).flatten()
