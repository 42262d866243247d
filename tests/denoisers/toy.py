"""A family that afa does not have, with all that is to be known of it, as another package adds it.

The model is two blocks of convolutions; its pipeline is Stable Diffusion's with this denoiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from afa.denoisers import (
    PLAIN,
    Conditioning,
    Family,
    Feature,
    PipelineKind,
    SingleFiles,
    Widths,
    split_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from afa.denoisers import Blocks, Execution, FileDenoiser


class Toy(ModelMixin, ConfigMixin):
    """Two blocks of convolutions with an embedded timestep and the mean of a text."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        width: int = 8,
        text_width: int = 8,
        sample_size: int = 8,
        time_cond_proj_dim: int | None = None,  # which the pipeline asks for
    ) -> None:
        super().__init__()
        self.time, self.text = nn.Linear(1, width), nn.Linear(text_width, width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Any = None,
        cross_attention_kwargs: Any = None,
        added_cond_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise [B, C, H, W]; the last arguments are what the pipeline passes too."""
        del timestep_cond, cross_attention_kwargs, added_cond_kwargs
        temb = embed(self, sample, timestep, encoder_hidden_states)
        hidden = self.conv_in(sample)
        for block in self.blocks:
            hidden = hidden + block(torch.relu(hidden + temb[:, :, None, None]))
        out = self.conv_out(hidden)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class ToyPipeline(StableDiffusionPipeline):
    """Stable Diffusion's pipeline with another denoiser."""


def embed(model: Any, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The embedded timestep and text [B, T]."""
    steps = timestep.expand(len(sample))[:, None].to(sample.dtype) / 1000
    return model.time(steps) + model.text(text.mean(1))


def toy_blocks(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    *,
    execution: Execution = PLAIN,
    **_: Any,
) -> Blocks:
    """Sites, in order: `embed`, `block.K` after each block, `out`."""
    temb = embed(model, sample, timestep, encoder_hidden_states)

    def layer(block: nn.Module, hidden: Tensor) -> Tensor:
        return hidden + execution.run(block, torch.relu(hidden + temb[:, :, None, None]))

    hidden = yield Feature("embed", model.conv_in(sample), temb)
    for k, block in enumerate(model.blocks):
        site = f"block.{k}"
        hidden = yield Feature(site, execution.segment(site, layer, block, hidden), temb)
    return (yield Feature("out", execution.segment("out", model.conv_out, hidden), temb))


def toy_example(model: Any) -> dict[str, Any]:
    """The smallest complete input, on the meta device."""
    config = model.config
    return {
        "sample": torch.empty(1, config.in_channels, 8, 8, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, config.text_width, device="meta"),
    }


def _encode(pipeline: Any, captions: list[str]) -> dict[str, Tensor]:
    return {"text": pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)[0]}


def _predict(
    pipeline: Any, denoiser: Any, noisy: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    del pipeline
    text = conditions["text"]
    return denoiser(noisy.to(text.dtype), timestep, text, return_dict=False)[0]


def _convert(
    tensors: Mapping[str, Tensor], settings: dict[str, Any], folder: Path
) -> dict[str, Tensor]:
    """The original code calls the first layer `stem`."""
    del settings, folder
    return {name.replace("stem.", "conv_in."): tensor for name, tensor in tensors.items()}


def toy_family(configuration: Path) -> Family:
    """The family, whose single files a pipeline's folder describes."""

    def describe(file: FileDenoiser) -> Path:
        assert file.size("blocks.0.weight", 0) == 8
        return configuration

    return Family(
        name="toy",
        model_class=Toy,
        output_class=Transformer2DModelOutput,
        blocks=toy_blocks,
        layers=lambda model: list(model.blocks),
        check=lambda _: None,
        example=toy_example,
        widths=lambda model: Widths((model.config.text_width,)),
        split=lambda _, arguments, widths, count: split_text(arguments, widths, count),
        attention_kwargs="cross_attention_kwargs",
        latent="sample",
        component="unet",
        original_blocks=("stem",),
        pipelines=(
            PipelineKind(
                name="Toy",
                pipelines=(ToyPipeline,),
                text=("text_encoder",),
                conditioning=Conditioning(_encode, _predict),
                single_files=SingleFiles(
                    configuration=describe,
                    parts={"text_encoder": ("cond_stage_model.",), "vae": ("first_stage_model.",)},
                    original=("stem.weight",),
                    diffusers=("conv_in.weight", "blocks.0.weight"),
                    convert=_convert,
                ),
                gives_latent=True,
            ),
        ),
    )
