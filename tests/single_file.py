"""A tiny Stable Diffusion 1.x checkpoint in the layout of the original code, as the web has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline under the names of the original code."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(pipeline.vae).items()}
    for key, tensor in pipeline.text_encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _rename(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    return key


def _unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for b in range(len(unet.down_blocks)):
        for i in range(layers):
            number = 1 + b * (layers + 1) + i
            places[f"down_blocks.{b}.resnets.{i}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{b}.attentions.{i}"] = f"input_blocks.{number}.1"
        number = (b + 1) * (layers + 1)
        places[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for b, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for i in range(layers + 1):
            number = b * (layers + 1) + i
            places[f"up_blocks.{b}.resnets.{i}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{b}.attentions.{i}"] = f"output_blocks.{number}.1"
        upsampler = f"output_blocks.{number}.{2 if attends else 1}.conv"
        places[f"up_blocks.{b}.upsamplers.0.conv"] = upsampler
    result = {}
    for key, tensor in unet.state_dict().items():
        place = next(p for p in places if key.startswith(f"{p}."))
        rest = key.removeprefix(f"{place}.")
        if ".resnets." in place:
            rest = _rename(rest, _RESNET)
        result[f"{places[place]}.{rest}"] = tensor
    return result


def _vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    places = {}
    for side in ("encoder", "decoder"):
        for n in (0, 1):
            places[f"{side}.mid_block.resnets.{n}"] = f"{side}.mid.block_{n + 1}"
        places[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    for b in range(levels):
        for i in range(vae.config.layers_per_block + 1):
            places[f"encoder.down_blocks.{b}.resnets.{i}"] = f"encoder.down.{b}.block.{i}"
            up = f"decoder.up.{levels - 1 - b}"
            places[f"decoder.up_blocks.{b}.resnets.{i}"] = f"{up}.block.{i}"
            places[f"decoder.up_blocks.{b}.upsamplers.0"] = f"{up}.upsample"
        places[f"encoder.down_blocks.{b}.downsamplers.0"] = f"encoder.down.{b}.downsample"
    result = {}
    for key, tensor in vae.state_dict().items():
        place = next((p for p in places if key.startswith(f"{p}.")), None)
        if place is None:
            result[key] = tensor
            continue
        rest = _rename(key.removeprefix(f"{place}."), {"conv_shortcut": "nin_shortcut"})
        if ".attentions." in place:
            rest = _rename(rest, _ATTENTION)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        result[f"{places[place]}.{rest}"] = tensor
    return result
