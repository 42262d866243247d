"""Denoisers and pipelines with random weights, in the sizes of the benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_ATTENDS = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def _stable_diffusion(*widths: int) -> dict[str, Any]:
    """Return the configuration of Stable Diffusion 1.5's U-Net with other widths."""
    (attends, plain), (plain_up, attends_up) = _ATTENDS
    count = len(widths) - 1
    return {
        "sample_size": 32,
        "block_out_channels": widths,
        "down_block_types": (attends,) * count + (plain,),
        "up_block_types": (plain_up,) + (attends_up,) * count,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


SD15_UNET = _stable_diffusion(320, 640, 1280, 1280)
SD15_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
#: configurations of U-Nets by their names in tables
UNETS: dict[str, dict[str, Any]] = {
    "(64, 128, 256)": _stable_diffusion(64, 128, 256),
    "(160, 320, 640, 640)": _stable_diffusion(160, 320, 640, 640),
    "Stable Diffusion 1.5": SD15_UNET,
    "Stable Diffusion XL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
ZOO = "zoo, (32, 96)"
#: length of the text in tokens
NUM_TOKENS = {ZOO: 24}


def build_unet(size: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Build a U-Net with random weights in its data type."""
    from diffusers import UNet2DConditionModel

    from afa.zoo.models import build_unet as build_zoo_unet

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = build_zoo_unet() if size == ZOO else UNet2DConditionModel(**UNETS[size])
    finally:
        torch.set_default_dtype(before)
    return unet.eval().requires_grad_(False)


def example(
    unet: Any, size: str, num_experts: int, latent: int, batch: int, dtype: torch.dtype
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the arguments of an ensemble's call and of an expert's own call."""
    tokens, width = NUM_TOKENS.get(size, 77), unet.config.cross_attention_dim
    text = torch.randn(batch, tokens, num_experts * width, dtype=dtype)
    shared: dict[str, Any] = {
        "sample": torch.randn(batch, unet.config.in_channels, latent, latent, dtype=dtype)
    }
    pooled = None
    if unet.config.addition_embed_type == "text_time":
        pooled = torch.randn(batch, num_experts * 1280, dtype=dtype)
        ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch, dtype=dtype)

    def added(part: torch.Tensor) -> dict[str, Any]:
        return {"added_cond_kwargs": {"text_embeds": part, "time_ids": ids}}

    own = [
        {**shared, "encoder_hidden_states": part.contiguous()}
        for part in text.chunk(num_experts, -1)
    ]
    together = {**shared, "encoder_hidden_states": text}
    if pooled is not None:
        together |= added(pooled)
        parts = pooled.chunk(num_experts, -1)
        own = [{**given, **added(part)} for given, part in zip(own, parts, strict=True)]
    return together, own
