"""Tiny denoisers of ComfyUI with random weights, and their twins in diffusers."""

from __future__ import annotations

import copy
from typing import Any

import comfy.ops
import comfy.supported_models as supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

OPS = comfy.ops.disable_weight_init
TEXT, POOLED = 16, 8
#: ComfyUI's configuration and diffusers' of the same tiny U-Net
_SD15 = (
    {
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 0, 0],
        "num_heads": 2,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "num_classes": None,
    },
    {
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
)
_SDXL = (
    {
        **_SD15[0],
        "transformer_depth": [1, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [1, 1, 2, 2],
        "num_heads": -1,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "adm_in_channels": 8 + 6 * 256,
        "num_classes": "sequential",
    },
    {
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 8 + 6 * 256,
    },
)
UNETS = {"sd15": _SD15, "sdxl": _SDXL}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random parameters and buffers, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for buffer in model.buffers():  # the positions of Stable Diffusion 3
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))


def unet(kind: str, seed: int = 0, text: int = TEXT) -> UNetModel:
    """A U-Net of ComfyUI."""
    model = UNetModel(
        image_size=8,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        use_spatial_transformer=True,
        context_dim=text,
        legacy=False,
        dtype=torch.float32,
        operations=OPS,
        **_copy(UNETS[kind][0]),
    )
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def unet_twin(kind: str, model: UNetModel) -> UNet2DConditionModel:
    """The same U-Net in diffusers."""
    twin = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        cross_attention_dim=TEXT,
        norm_num_groups=32,
        **UNETS[kind][1],
    )
    names = comfy.utils.unet_to_diffusers(_copy(UNETS[kind][0]) | {"model_channels": 32})
    own = model.state_dict()
    twin.load_state_dict({name: own[names[name]] for name in twin.state_dict()})
    return twin.eval().requires_grad_(False)


def _copy(config: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, list) else v for key, v in config.items()}


def unet_call(kind: str, count: int = 1, batch: int = 2, size: int = 8) -> dict[str, Any]:
    """The arguments of one call with texts of several experts."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    call = {
        "sample": random(batch, 4, size, size),
        "timestep": torch.tensor([500.0] * batch),
        "encoder_hidden_states": random(batch, 5, count * TEXT),
    }
    if kind == "sdxl":
        call["y"] = random(batch, count * 8 + 6 * 256)
    return call


FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "vec_in_dim": POOLED,
    "context_in_dim": TEXT,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": True,
}
SD3: dict[str, Any] = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 4,
    "depth": 2,
    "num_blocks": 2,
    "adm_in_channels": POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": TEXT, "out_features": 128},
    },
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}
KINDS = (*UNETS, "flux", "sd3")
_PATCHES = {
    "sd15": supported_models.SD15,
    "sdxl": supported_models.SDXL,
    "flux": supported_models.Flux,
    "sd3": supported_models.SD3,
}


def denoiser(kind: str, seed: int = 0, text: int = TEXT) -> Any:
    """A tiny denoiser of ComfyUI."""
    if kind in UNETS:
        return unet(kind, seed, text)
    model_class, config = (Flux, FLUX) if kind == "flux" else (OpenAISignatureMMDITWrapper, SD3)
    model = model_class(**copy.deepcopy(config), dtype=torch.float32, operations=OPS)
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def twin_of(kind: str, model: Any) -> Any:
    """The same denoiser in diffusers."""
    if kind in UNETS:
        return unet_twin(kind, model)
    if kind == "flux":
        twin: Any = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        names = comfy.utils.flux_to_diffusers(FLUX)
    else:
        twin = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=128,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        names = comfy.utils.mmdit_to_diffusers(SD3)
        names["pos_embed.pos_embed"] = "pos_embed"
    own = model.state_dict()
    twin.load_state_dict({name: _renamed(own, names[name]) for name in twin.state_dict()})
    return twin.eval().requires_grad_(False)


def _renamed(own: dict[str, torch.Tensor], place: Any) -> torch.Tensor:
    """A tensor by ComfyUI's own table of names: a name, a slice of rows, a function."""
    name, rows, change = (*place, None, None)[:3] if isinstance(place, tuple) else (place, 0, None)
    tensor = own[name]
    if rows:
        tensor = tensor.narrow(*rows)
    return tensor if change is None else change(tensor)


def call_of(kind: str, count: int = 1, batch: int = 2, size: int = 8) -> dict[str, Any]:
    """The arguments of one call of a coroutine, with texts of several experts."""
    if kind in UNETS:
        return unet_call(kind, count, batch, size)
    call = unet_call("sd15", count, batch, size)
    generator = torch.Generator().manual_seed(8)
    call["y"] = torch.randn(batch, count * POOLED, generator=generator)
    if kind == "flux":
        call["timestep"] = torch.tensor([0.7] * batch)
        call["guidance"] = torch.tensor([3.5] * batch)
    return call


def patcher(
    kind: str, seed: int = 0, text: int = TEXT, dtype: torch.dtype = torch.float32
) -> ModelPatcher:
    """A MODEL with a tiny denoiser."""
    given = {"flux": FLUX, "sd3": SD3}.get(kind) or {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "use_spatial_transformer": True,
        "context_dim": text,
        "legacy": False,
        **UNETS[kind][0],
    }
    config = _PATCHES[kind](copy.deepcopy(given))
    config.unet_config.update(copy.deepcopy(given))
    for key in ("num_heads", "num_head_channels"):
        if key not in given:
            config.unet_config.pop(key, None)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    base = config.get_model({}, device="cpu")
    base.diffusion_model.load_state_dict(denoiser(kind, seed, text).state_dict())
    base.diffusion_model.requires_grad_(False)
    return ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def lora_of(model: ModelPatcher, seed: int = 5, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of all attention layers, in kohya's layout."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if ".attn" in name and name.endswith(".weight"):
            place = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down = torch.randn(rank, weight.shape[1], generator=generator)
            lora[f"{place}.lora_down.weight"] = down / weight.shape[1] ** 0.5
            lora[f"{place}.lora_up.weight"] = torch.randn(
                weight.shape[0], rank, generator=generator
            )
            lora[f"{place}.alpha"] = torch.tensor(float(rank))
    return lora
