"""Tiny models with random weights, in the shapes of the real families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from afa.zoo.models import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT_WIDTH = 16
SD1: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
#: Stable Diffusion 2.x: linear projections, heads by size, attention computed in float32
SD2: dict[str, Any] = {
    **SD1,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4, 4),
    "upcast_attention": True,
}
#: of two levels, for tests of what is around the denoiser: half the time of `SD1`
SMALL_UNET: dict[str, Any] = {
    **SD1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
POOLED_WIDTH = 12
#: Stable Diffusion XL: pooled text and sizes beside the timestep, deep attention; and its refiner
SDXL: dict[str, Any] = {
    **SD1,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 4,
}
REFINER: dict[str, Any] = {
    **SDXL,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 5 * 4,
}
#: what the zoo has, and further corners: one level, mid without attention, no mid at all
ODD: dict[str, dict[str, Any]] = {
    "two levels": {
        **SD1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    },
    "one level": {
        **SD1,
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "plain mid": {**SD1, "mid_block_type": "UNetMidBlock2D"},
    "no mid": {**SD1, "mid_block_type": None},
    "centred input": {**SD1, "center_input_sample": True},
    "scale shift": {**SD1, "resnet_time_scale_shift": "scale_shift"},
    "deep attention": {**SD1, "transformer_layers_per_block": (1, 2, 1)},
    "time activation": {**SD1, "time_embedding_act_fn": "silu"},
}


def tiny_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """A U-Net whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**SD1, **config}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def inputs(
    batch: int = 2, height: int = 8, width: int = 8, text_width: int = TEXT_WIDTH, seed: int = 1
) -> dict[str, Any]:
    """Arguments of a denoiser's call."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, text_width, generator=generator),
    }


def xl_inputs(num_experts: int = 1, num_ids: int = 6, **settings: int) -> dict[str, Any]:
    """As `inputs`, of Stable Diffusion XL, with the texts of several experts concatenated."""
    call = inputs(text_width=TEXT_WIDTH * num_experts, **settings)
    batch = len(call["sample"])
    generator = torch.Generator().manual_seed(2)
    call["added_cond_kwargs"] = {
        "text_embeds": torch.randn(batch, POOLED_WIDTH * num_experts, generator=generator),
        "time_ids": torch.randint(64, (batch, num_ids), generator=generator).float(),
    }
    return call


def tiny_pipeline(folder: Path, seed: int = 0, **config: Any) -> StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline; its tokenizer is written to `folder`.

    Args:
        folder: for the tokenizer.
        seed: of the weights.
        config: what differs from `SMALL_UNET` in the U-Net's configuration.
    """
    tokenizer = build_tokenizer(folder)
    unet = tiny_unet(seed, **{**SMALL_UNET, **config})
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
