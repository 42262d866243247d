"""Tiny random weights in the very file formats of the public ones."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)

from afa.metrics.pictures import CLIP_MEAN, CLIP_STD
from afa.zoo.models import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

Model = TypeVar("Model", bound="nn.Module")
PROMPTS = ["a fox on the left", "an odd pizza, blue background", ""]


def pictures(num: int = 3, size: tuple[int, int] = (40, 36)) -> list[Image.Image]:
    levels = np.random.default_rng(7).integers(0, 256, (num, *size, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in levels]


def shake(model: Model) -> Model:
    """Every parameter random, biases, norms and tokens included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def write_processor(folder: Path, size: int = 28) -> int:
    """A tokenizer and CLIP's `preprocessor_config.json`; the number of tokens."""
    tokenizer = build_tokenizer(folder)
    settings = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": {"shortest_edge": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return len(tokenizer)


def tiny_clip(vocab_size: int, act: str = "gelu") -> CLIPModel:
    """A CLIP of ViT-H/14's proportions: heads of 80 and of 64 numbers."""
    config = CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "projection_dim": 24,
            "hidden_act": act,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 24,
            "hidden_act": act,
        },
    )
    return shake(CLIPModel(config))


def write_clip(folder: Path) -> CLIPModel:
    """A CLIP folder as on the hub: model, tokenizer, preprocessing."""
    model = tiny_clip(write_processor(folder), act="quick_gelu")
    model.save_pretrained(folder)
    return model


def open_clip_tensors(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIP's weights in open_clip's names, written out as that library lays them out."""
    text, vision = model.text_model, model.vision_model
    tensors = {
        "logit_scale": model.logit_scale,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "text_projection": model.text_projection.weight.T,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
    }
    norms = {
        "ln_final": text.final_layer_norm,
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
    }
    for prefix, tower in (("transformer", text), ("visual.transformer", vision)):
        for number, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}.resblocks.{number}", layer.self_attn
            norms |= {f"{block}.ln_1": layer.layer_norm1, f"{block}.ln_2": layer.layer_norm2}
            norms |= {f"{block}.attn.out_proj": attention.out_proj}
            norms |= {f"{block}.mlp.c_fc": layer.mlp.fc1, f"{block}.mlp.c_proj": layer.mlp.fc2}
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            tensors[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight for part in parts])
            tensors[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias for part in parts])
    for name, module in norms.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = module.weight, module.bias
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def head_tensors(width: int, prefix: str) -> dict[str, Tensor]:
    """Five linear layers under the numbers that LAION's predictor has, dropout between them."""
    tensors = {}
    for number, (come, go) in zip((0, 2, 4, 6, 7), pairwise((width, 12, 9, 7, 5, 1)), strict=True):
        tensors[f"{prefix}{number}.weight"] = torch.randn(go, come) / come**0.5
        tensors[f"{prefix}{number}.bias"] = torch.randn(go)
    return tensors


def tiny_blip(vocab_size: int) -> tuple[BlipVisionModel, BlipTextModel]:
    vision = BlipVisionConfig(
        hidden_size=128,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        **MED_CONFIG | {"vocab_size": vocab_size},
        encoder_hidden_size=128,
        bos_token_id=None,
        sep_token_id=None,
        eos_token_id=None,
    )
    return shake(BlipVisionModel(vision)), shake(BlipTextModel(text, add_pooling_layer=False))


MED_CONFIG = {
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 50,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def blip_tensors(
    vision: BlipVisionModel, text: BlipTextModel, head: dict[str, Tensor]
) -> dict[str, Tensor]:
    """BLIP's weights in the names of its own code, as in ImageReward.pt."""
    see = "blip.visual_encoder."
    tensors = {
        f"{see}cls_token": vision.embeddings.class_embedding,
        f"{see}pos_embed": vision.embeddings.position_embedding,
        "blip.text_encoder.embeddings.position_ids": torch.arange(50)[None],
        "blip.text_proj.weight": torch.zeros(4, 36),
        **{f"blip.text_encoder.{key}": tensor for key, tensor in text.state_dict().items()},
        **head,
    }
    modules = {"patch_embed.proj": vision.embeddings.patch_embedding, "norm": vision.post_layernorm}
    for number, layer in enumerate(vision.encoder.layers):
        block = f"blocks.{number}"
        modules |= {f"{block}.norm1": layer.layer_norm1, f"{block}.norm2": layer.layer_norm2}
        modules |= {f"{block}.attn.qkv": layer.self_attn.qkv}
        modules |= {f"{block}.attn.proj": layer.self_attn.projection}
        modules |= {f"{block}.mlp.fc1": layer.mlp.fc1, f"{block}.mlp.fc2": layer.mlp.fc2}
    for name, module in modules.items():
        tensors[f"{see}{name}.weight"] = module.weight
        tensors[f"{see}{name}.bias"] = module.bias
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def write_bert_tokenizer(folder: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer
