"""HPSv2: a CLIP ViT-H/14 trained on human preferences, published in the format of open_clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.machine.damaged import Unreadable
from afa.metrics.clip import ClipEncoder, ClipScorer, load_clip_tokenizer
from afa.metrics.pictures import Preprocessing
from afa.metrics.weights import PROCESSOR_FILES, Source, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor
    from transformers import CLIPConfig

HPSV2_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
# head sizes of ViT-H/14, which shapes do not determine: 1280 / 16 heads (vision), 1024 / 16 (text)
_VISION_HEAD_SIZE = 80
_TEXT_HEAD_SIZE = 64
# names in open_clip -> names in transformers
_PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_TOWERS = {"transformer.resblocks.": "text_model", "visual.transformer.resblocks.": "vision_model"}
_LAYER = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}


def load_hpsv2(source: Source, processor: Source, device: torch.device | str) -> ClipScorer:
    """Load HPSv2 (Wu et al., 2023): the cosine of picture and prompt, as in `hpsv2.score`.

    The authors resize tensors, afa resizes with Pillow, so scores differ in the fourth digit.
    https://arxiv.org/abs/2306.09341, https://github.com/tgxs002/HPSv2

    Args:
        source: the weights: a file, a folder or a hub id.
        processor: the tokenizer of CLIP.
        device: device of the model.

    Raises:
        AfaError: if a file is missing, incomplete or a pickle that is not allowed.
    """
    from transformers import CLIPModel

    file = source.file(HPSV2_FILES)
    tensors = source.tensors(file)
    with source.reading():
        config = open_clip_config(tensors)
        renamed = rename_open_clip(tensors)
    model = source.model(CLIPModel, config=config, state_dict=renamed)
    tokenizer = load_clip_tokenizer(processor, processor.locate(PROCESSOR_FILES), model)
    preprocessing = Preprocessing.square(config.vision_config.image_size)
    encoder = ClipEncoder(f"hpsv2({source.name})", model.to(device), tokenizer, preprocessing)
    return ClipScorer("hpsv2", encoder)


def open_clip_config(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """Derive the configuration of an open_clip ViT-H/14 from the shapes in its state dictionary.

    Raises:
        Lacking: if a tensor that determines a size is missing.
        Unreadable: if it has another number of dimensions.
    """
    from transformers import CLIPConfig

    def num_layers(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})

    text, vision = _TOWERS
    vocab_size, text_width = shape_of(tensors, "token_embedding.weight", 2)
    vision_width, _, patch_size, _ = shape_of(tensors, "visual.conv1.weight", 4)
    num_patches = shape_of(tensors, "visual.positional_embedding", 2)[0] - 1
    embedding_width = shape_of(tensors, "text_projection", 2)[1]
    return CLIPConfig(
        projection_dim=embedding_width,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shape_of(tensors, f"{text}0.mlp.c_fc.bias", 1)[0],
            "num_hidden_layers": num_layers(text),
            "num_attention_heads": max(text_width // _TEXT_HEAD_SIZE, 1),
            "max_position_embeddings": shape_of(tensors, "positional_embedding", 2)[0],
            "projection_dim": embedding_width,
            "hidden_act": "gelu",
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,  # CLIPModel pools the text at this token
            "pad_token_id": vocab_size - 1,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": shape_of(tensors, f"{vision}0.mlp.c_fc.bias", 1)[0],
            "num_hidden_layers": num_layers(vision),
            "num_attention_heads": max(vision_width // _VISION_HEAD_SIZE, 1),
            "image_size": round(num_patches**0.5) * patch_size,
            "patch_size": patch_size,
            "projection_dim": embedding_width,
            "hidden_act": "gelu",
        },
    )


def rename_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an open_clip state dictionary for `CLIPModel` of transformers.

    Splits the joint matrix of query, key and value, and transposes the two projections.

    Raises:
        Unreadable: if a joint matrix cannot be split.
    """
    for old in _TRANSPOSED:
        if old in tensors:
            shape_of(tensors, old, 2)
    renamed = {new: tensors[old] for old, new in _PLAIN.items() if old in tensors}
    renamed |= {new: tensors[old].T for old, new in _TRANSPOSED.items() if old in tensors}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _TOWERS if key.startswith(prefix)), None)
        if prefix is None:
            continue
        number, _, name = key.removeprefix(prefix).partition(".")
        layer = f"{_TOWERS[prefix]}.encoder.layers.{number}"
        if name in _LAYER:
            renamed[f"{layer}.{_LAYER[name]}"] = tensor
        elif name.startswith("attn.in_proj_"):
            kind = name.removeprefix("attn.in_proj_")
            if tensor.ndim == 0 or len(tensor) % 3:
                raise Unreadable(f"'{key}' of shape {tuple(tensor.shape)} cannot be split in three")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = chunk
    return {key: tensor.contiguous() for key, tensor in renamed.items()}
