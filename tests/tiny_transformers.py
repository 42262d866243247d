"""Tiny transformers with random weights, in the shapes of the real families."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

TEXT_WIDTH, POOLED_WIDTH, TEXT_LENGTH = 16, 12, 5
WIDE = ("encoder_hidden_states", "pooled_projections")
_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "axes_dims_rope": (2, 2, 4),
}
_FLUX2: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
}
_CHROMA: dict[str, Any] = {
    **{key: value for key, value in _FLUX.items() if key != "pooled_projection_dim"},
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 12,
    "approximator_layers": 2,
}
_SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": POOLED_WIDTH,
    "pos_embed_max_size": 12,
}
_Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 16,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": (2, 2, 4),
    "axes_lens": (640, 64, 64),
}
_QWEN: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (2, 2, 4),
}
_PIXART: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": TEXT_WIDTH,
}
_DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (FluxTransformer2DModel, {**_FLUX, "guidance_embeds": True}),
    "flux schnell": (FluxTransformer2DModel, _FLUX),
    "klein": (Flux2Transformer2DModel, _FLUX2),
    "chroma": (ChromaTransformer2DModel, _CHROMA),
    "sd3": (SD3Transformer2DModel, _SD3),
    "sd3.5": (
        SD3Transformer2DModel,
        {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    ),
    "z-image": (ZImageTransformer2DModel, _Z_IMAGE),
    "qwen-image": (QwenImageTransformer2DModel, _QWEN),
    "pixart": (PixArtTransformer2DModel, _PIXART),
    "pixart 1024": (PixArtTransformer2DModel, {**_PIXART, "use_additional_conditions": True}),
    "dit": (DiTTransformer2DModel, _DIT),
}


def tiny_transformer(kind: str, seed: int = 0, **config: Any) -> Any:
    """A transformer whose every parameter is random, biases and norms included."""
    torch.manual_seed(seed)
    model_class, settings = KINDS[kind]
    model = model_class(**{**settings, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or len(parameter) == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformer_inputs(
    kind: str,
    batch: int = 2,
    height: int = 8,
    width: int = 8,
    num_experts: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of a transformer's call; texts of several experts are concatenated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    text = draw(batch, TEXT_LENGTH, TEXT_WIDTH * num_experts)
    pooled = draw(batch, POOLED_WIDTH * num_experts)
    latent, steps = draw(batch, 4, height, width), torch.tensor([12.0, 700.0])[:batch]
    if kind == "klein":
        rows, columns = height // 2, width // 2
        one = torch.arange(1)
        ids = torch.cartesian_prod(one, torch.arange(rows), torch.arange(columns), one)
        return {
            "hidden_states": draw(batch, rows * columns, 16),
            "encoder_hidden_states": text,
            "timestep": (steps / 1000).to(dtype),
            "img_ids": ids.expand(batch, -1, -1),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(TEXT_LENGTH)),
        }
    if kind.startswith(("flux", "chroma")):
        rows, columns = height // 2, width // 2
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)
        inputs: dict[str, Any] = {
            "hidden_states": draw(batch, rows * columns, 16),
            "encoder_hidden_states": text,
            "timestep": (steps / 1000).to(dtype),
            "img_ids": ids.flatten(0, 1).to(dtype),
            "txt_ids": torch.zeros(TEXT_LENGTH, 3, dtype=dtype),
        }
        if kind == "chroma":  # one text is padded; the image's tokens count
            mask = torch.ones(batch, TEXT_LENGTH + rows * columns, dtype=dtype)
            mask[0, 3:TEXT_LENGTH] = 0
            return {**inputs, "attention_mask": mask}
        inputs["pooled_projections"] = pooled
        if kind == "flux":
            inputs["guidance"] = torch.full((batch,), 3.5)
        return inputs
    if kind == "qwen-image":  # one text is padded
        mask = torch.ones(batch, TEXT_LENGTH, dtype=torch.long)
        mask[0, 3:] = 0
        return {
            "hidden_states": draw(batch, height * width // 4, 16),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "timestep": (steps / 1000).to(dtype),
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }
    if kind == "z-image":  # its time runs the other way; one text is shorter
        texts = [own[: TEXT_LENGTH - 2 * n].contiguous() for n, own in enumerate(text)]
        return {
            "x": list(latent.unsqueeze(2).unbind(0)),
            "t": 1 - steps / 1000,
            "cap_feats": texts,
        }
    inputs = {"hidden_states": latent, "timestep": steps}
    if kind == "dit":
        return {**inputs, "timestep": steps.long(), "class_labels": torch.tensor([3, 7])[:batch]}
    inputs["encoder_hidden_states"] = text
    if kind.startswith("sd3"):
        return {**inputs, "pooled_projections": pooled}
    mask = torch.ones(batch, TEXT_LENGTH)
    mask[0, 3:] = 0
    inputs["encoder_attention_mask"] = mask
    if kind == "pixart 1024":
        inputs["added_cond_kwargs"] = {
            "resolution": torch.full((batch, 2), 64.0),
            "aspect_ratio": torch.ones(batch, 1),
        }
    return inputs


def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own forward pass."""
    return stacked(model(**inputs, return_dict=False)[0])


def stacked(output: Any) -> torch.Tensor:
    """The output of a model; Z-Image returns a list."""
    return output if isinstance(output, torch.Tensor) else torch.stack(output)


def inputs_of(inputs: dict[str, Any], expert: int, num_experts: int) -> dict[str, Any]:
    """The arguments of one expert, from those of an ensemble of several."""

    def own(text: torch.Tensor) -> torch.Tensor:
        return text.chunk(num_experts, dim=-1)[expert].contiguous()

    found = {k: own(v) if k in WIDE else v for k, v in inputs.items()}
    if "cap_feats" in found:
        found["cap_feats"] = list(map(own, found["cap_feats"]))
    return found


def latents_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The noisy latents among the arguments."""
    return inputs["x"] if "x" in inputs else [inputs["hidden_states"]]
