"""ImageReward: a BLIP model of picture and prompt with a linear reward head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError
from afa.files import read_json
from afa.loading.truncation import TextLimit
from afa.metrics.aesthetic import linear_head
from afa.metrics.pictures import Preprocessing, one_by_one, require_partners
from afa.metrics.weights import PROCESSOR_FILES, Source, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from PIL import Image
    from torch import Tensor, nn
    from transformers import (
        BlipTextConfig,
        BlipTextModel,
        BlipVisionConfig,
        BlipVisionModel,
        PreTrainedTokenizerBase,
    )

IMAGEREWARD_FILES = ("ImageReward.safetensors", "ImageReward.pt")
MED_CONFIG = "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of rewards on the authors' data
_MAX_TOKENS = 35
_VISION = "blip.visual_encoder."
_TEXT = "blip.text_encoder."
_HEAD_SIZE = 64  # of every BLIP vision transformer; shapes do not determine it
# names in BLIP's code -> names in transformers
_VISION_PARTS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
_LAYER_PARTS = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


class ImageRewardScorer:
    """Predicts human preference for a picture with its prompt (ImageReward, Xu et al., 2023).

    Scores are standardized by the mean and standard deviation on the authors' pictures.
    https://arxiv.org/abs/2304.05977, https://github.com/THUDM/ImageReward
    """

    name = "imagereward"
    higher_is_better = True

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.vision = vision
        self.text = text
        self.head = head
        self.tokenizer = tokenizer
        self.preprocessing = Preprocessing.square(vision.config.image_size)

    @property
    def text_limits(self) -> list[TextLimit]:
        """The token limit of prompts."""
        return [TextLimit((f"the metric '{self.name}'",), self.tokenizer, _MAX_TOKENS)]

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Compute the reward of each picture with its prompt, truncated to 35 tokens.

        Raises:
            AfaError: if there are no pictures, or the number of prompts differs.
        """
        require_partners(pictures, prompts)
        return one_by_one(list(zip(pictures, prompts, strict=True)), self._reward).tolist()

    def _reward(self, pair: tuple[Image.Image, str]) -> Tensor:
        picture, prompt = pair
        device = self.vision.device
        image = self.vision(self.preprocessing.pixels(picture)[None].to(device)).last_hidden_state
        # no padding is needed: a masked token has no effect
        ids = self.tokenizer(prompt, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        text = self.text(
            ids["input_ids"].to(device),
            attention_mask=ids["attention_mask"].to(device),
            encoder_hidden_states=image,
        ).last_hidden_state
        return (self.head(text[0, 0])[0] - MEAN) / STD


def load_imagereward(
    source: Source, processor: Source, device: torch.device | str
) -> ImageRewardScorer:
    """Load ImageReward from its published file and the `med_config.json` next to it.

    Args:
        source: the weights: a file, a folder or a hub id.
        processor: the tokenizer of BERT.
        device: device of the model.

    Raises:
        AfaError: if a file is missing, incomplete or a pickle that is not allowed.
    """
    from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

    file = source.file(IMAGEREWARD_FILES, beside=[MED_CONFIG])
    settings = read_json(file.parent / MED_CONFIG)
    tensors = source.tensors(file)
    with source.reading():
        vision_config, text_config = blip_configs(tensors, settings)
        head = linear_head(tensors, "mlp.layers.")
    vision = source.model(
        BlipVisionModel, config=vision_config, state_dict=rename_blip_vision(tensors)
    )
    text = source.model(
        BlipTextModel,
        config=text_config,
        state_dict={k.removeprefix(_TEXT): t for k, t in tensors.items() if k.startswith(_TEXT)},
        add_pooling_layer=False,
    )
    tokenizer = processor.tokenizer(
        BertTokenizer,
        processor.locate(PROCESSOR_FILES),
        num_embeddings=text_config.vocab_size,
    )
    return ImageRewardScorer(vision.to(device), text.to(device), head.to(device), tokenizer)


def blip_configs(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Derive the configurations of BLIP: vision from tensor shapes, text from `med_config.json`.

    Raises:
        Lacking: if a tensor that determines a size is missing.
        Unreadable: if it has another number of dimensions.
        AfaError: if a setting is missing.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    missing = [name for name in _TEXT_SETTINGS if name not in settings]
    if missing:
        raise AfaError(
            "AFA-METRIC-012",
            f"'{MED_CONFIG}' lacks {', '.join(missing)}; it must be a configuration of BERT. "
            "Download that of zai-org/ImageReward.",
        )
    width, _, patch_size, _ = shape_of(tensors, f"{_VISION}patch_embed.proj.weight", 4)
    num_patches = shape_of(tensors, f"{_VISION}pos_embed", 3)[1] - 1
    blocks = f"{_VISION}blocks."
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(tensors, f"{blocks}0.mlp.fc1.bias", 1)[0],
        num_hidden_layers=len(
            {k.removeprefix(blocks).split(".")[0] for k in tensors if k.startswith(blocks)}
        ),
        num_attention_heads=max(width // _HEAD_SIZE, 1),
        image_size=round(num_patches**0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # as in BLIP's code; the default of transformers differs
    )
    text = BlipTextConfig(
        **{name: settings[name] for name in _TEXT_SETTINGS},
        encoder_hidden_size=width,
        bos_token_id=None,
        sep_token_id=None,
        eos_token_id=None,
    )
    return vision, text


def rename_blip_vision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the vision transformer of a BLIP state dictionary for transformers."""
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith(_VISION):
            continue
        name = key.removeprefix(_VISION)
        layer, parts = "", _VISION_PARTS
        if name.startswith("blocks."):
            number, _, name = name.removeprefix("blocks.").partition(".")
            layer, parts = f"encoder.layers.{number}.", _LAYER_PARTS
        old = next((old for old in parts if name.startswith(old)), None)
        if old is not None:
            renamed[layer + parts[old] + name.removeprefix(old)] = tensor
    return renamed
