"""CLIP embeddings of pictures and texts, CLIP-T, and PickScore, which is a fine-tuned CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import read_json
from afa.loading.truncation import TextLimit
from afa.metrics.distances import cosine_scores
from afa.metrics.pictures import Preprocessing, one_by_one, require_partners
from afa.metrics.weights import (
    MODEL_FILES,
    PROCESSOR_ADVICE,
    PROCESSOR_FILES,
    Source,
    describe,
)
from afa.zoo import assets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPModel, PreTrainedTokenizerBase

ZOO_CLIP = "zoo:clip"


class ClipEncoder:
    """A CLIP model, which embeds pictures and texts in one space (Radford et al., 2021).

    https://arxiv.org/abs/2103.00020
    """

    def __init__(
        self,
        name: str,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: Preprocessing,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed pictures: [n, d], float32 on the CPU, not normalized.

        Raises:
            AfaError: if there are no pictures.
        """
        return one_by_one(pictures, self._embed_picture)

    def text_limit(self, metric: str) -> TextLimit:
        """The token limit of prompts for a metric that uses this model."""
        return TextLimit((f"the metric '{metric}'",), self.tokenizer, self._num_tokens)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [n, d], float32 on the CPU, not normalized; truncates long texts.

        Raises:
            AfaError: if there are no texts.
        """
        distinct = list(dict.fromkeys(texts))
        index = {text: n for n, text in enumerate(distinct)}
        return one_by_one(distinct, self._embed_text)[[index[text] for text in texts]]

    @property
    def _num_tokens(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _embed_picture(self, picture: Image.Image) -> Tensor:
        pixels = self.preprocessing.pixels(picture)[None].to(self.model.device)
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)[0]

    def _embed_text(self, text: str) -> Tensor:
        # no padding is needed: attention is causal, so tokens after the end have no effect
        ids = self.tokenizer(
            text,
            truncation=True,
            max_length=self._num_tokens,
            return_tensors="pt",
        )["input_ids"].to(self.model.device)
        return self.model.text_projection(self.model.text_model(ids).pooler_output)[0]


class ClipScorer:
    """The cosine similarity of a picture's embedding with its prompt's, times `scale`.

    CLIP-T (Hessel et al., 2021, without their clamp and factor): scale 1.
    PickScore (Kirstain et al., 2023): a CLIP trained on preferences, scaled by its temperature.
    HPSv2 (Wu et al., 2023): a CLIP trained on preferences, scale 1.
    https://arxiv.org/abs/2104.08718, https://arxiv.org/abs/2305.01569,
    https://arxiv.org/abs/2306.09341
    """

    higher_is_better = True

    def __init__(self, name: str, encoder: ClipEncoder, scale: float = 1.0) -> None:
        self.name = name
        self.encoder = encoder
        self.scale = scale

    @property
    def text_limits(self) -> list[TextLimit]:
        """The token limit of prompts."""
        return [self.encoder.text_limit(self.name)]

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each picture with its prompt.

        Raises:
            AfaError: if there are no pictures, or the number of prompts differs.
        """
        require_partners(pictures, prompts)
        cosines = cosine_scores(self.encoder.features(pictures), self.encoder.texts(prompts))
        return [self.scale * cosine for cosine in cosines]


def pick_score(encoder: ClipEncoder) -> ClipScorer:
    """PickScore: the cosine times ``exp(logit_scale)``, which is 98.2 in the published model."""
    return ClipScorer("pickscore", encoder, encoder.model.logit_scale.exp().item())


def load_clip(source: Source, processor: Source | None, device: torch.device | str) -> ClipEncoder:
    """Load a CLIP of transformers: `zoo:clip`, a local folder or a hub id.

    Args:
        source: the model, as safetensors.
        processor: tokenizer and `preprocessor_config.json`; None uses the model's folder.
        device: device of the model.

    Raises:
        AfaError: if the model is missing, incomplete or not a CLIP.
    """
    from transformers import CLIPModel

    if source.name == ZOO_CLIP:
        model = source.model(CLIPModel, assets() / "judges" / "clip")
        size = model.config.vision_config.image_size
        half = (0.5, 0.5, 0.5)
        preprocessing = Preprocessing(crop=(size, size), shortest_edge=size, mean=half, std=half)
        parts, parts_folder = source, assets() / "shared" / "tokenizer"
    else:
        folder = source.locate([*MODEL_FILES, *PROCESSOR_FILES])
        kind = read_json(folder / "config.json").get("model_type") if folder.is_dir() else "a file"
        if kind != "clip":
            raise AfaError(
                "AFA-METRIC-002",
                f"{source.what} must be a folder whose config.json has the model_type clip; "
                f"'{source.name}' is {kind}. Public ones: {source.public}.",
            )
        model = source.model(CLIPModel, folder)
        parts, parts_folder = source, folder
        if processor is not None:
            parts, parts_folder = processor, processor.locate(PROCESSOR_FILES)
        preprocessing = Preprocessing.read(
            parts.part(parts_folder, ["preprocessor_config.json"], PROCESSOR_ADVICE)
        )
        size = model.config.vision_config.image_size
        if preprocessing.shape not in (None, (size, size)):
            raise AfaError(
                "AFA-METRIC-003",
                f"{parts.what} must resize pictures to the model's {size}x{size} pixels; "
                f"'{parts.name}' makes {preprocessing.shape}. Use the processor of the model.",
            )
    tokenizer = load_clip_tokenizer(parts, parts_folder, model)
    return ClipEncoder(
        f"clip({describe(source, processor)})", model.to(device), tokenizer, preprocessing
    )


def load_clip_tokenizer(source: Source, folder: Path, model: CLIPModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a CLIP model.

    Raises:
        AfaError: if there is none, or its vocabulary does not fit the model.
    """
    from transformers import CLIPTokenizer

    size = model.config.text_config.vocab_size
    return source.tokenizer(CLIPTokenizer, folder, num_embeddings=size)
