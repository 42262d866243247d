"""Stable Diffusion XL: its other stock pipelines run with an ensemble inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from torch import nn

import afa
from afa.aggregators import SABW
from tests.tiny_pipelines import saved_experts

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
NUM_EXPERTS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_experts("xl", tmp_path_factory.mktemp("xl"), NUM_EXPERTS)


@pytest.fixture
def pipeline(folders: list[Path]) -> Any:
    pipeline = afa.load_pipeline(folders, SMALL)
    for rule in pipeline.unet.aggregators:
        if isinstance(rule, SABW):
            nn.init.normal_(rule.conv_out.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(channels: int = 3) -> torch.Tensor:
    return torch.linspace(0, 1, channels * 16 * 16).view(1, channels, 16, 16)


def draw(pipeline: Any, **more: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a fox", num_inference_steps=3, generator=generator, output_type="np", **more
    )[0]
    assert np.isfinite(images).all()
    return images


def parts(pipeline: Any) -> dict[str, Any]:
    return {**pipeline.components, "add_watermarker": False}


def test_two_text_encoders_of_every_expert(pipeline: Any) -> None:
    assert pipeline.unet.widths == afa.denoisers.Widths((8, 12), (10,))
    text, _, pooled, _ = pipeline.encode_prompt("a fox")
    assert text.shape[-1] == NUM_EXPERTS * (8 + 12)
    assert pooled.shape[-1] == NUM_EXPERTS * 10


def test_from_a_picture(pipeline: Any) -> None:
    other = StableDiffusionXLImg2ImgPipeline(**parts(pipeline))
    assert draw(other, image=picture(), strength=0.7).shape == (1, 16, 16, 3)


def test_into_a_hole(pipeline: Any) -> None:
    other = StableDiffusionXLInpaintPipeline(**parts(pipeline))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    drawn = draw(other, image=picture(), mask_image=mask, strength=1.0, height=16, width=16)
    assert drawn.shape == (1, 16, 16, 3)


def test_with_a_controlnet(pipeline: Any) -> None:
    unet = pipeline.unet.experts[0]
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4))
    for layer in controlnet.controlnet_down_blocks:
        nn.init.normal_(layer.weight)  # zero before training
    seen: list[Any] = []
    afa.attach_controlnet(controlnet, NUM_EXPERTS, expert=1, widths=pipeline.unet.widths)
    controlnet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    other = StableDiffusionXLControlNetPipeline(**parts(pipeline), controlnet=controlnet)
    with_it = draw(other, image=picture(), height=16, width=16)
    assert not np.allclose(with_it, draw(pipeline, height=16, width=16), atol=1e-3)
    text, _, pooled, _ = pipeline.encode_prompt("a fox")
    own = torch.cat([text[..., 8:16], text[..., 24 + 12 : 24 + 24]], dim=-1)
    assert torch.equal(seen[0]["encoder_hidden_states"][-1:], own)
    assert torch.equal(seen[0]["added_cond_kwargs"]["text_embeds"][-1:], pooled[:, 10:20])
