"""Whole tiny pipelines with random weights, of every kind that experts come as."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from afa.zoo.models import build_tokenizer
from tests.tiny import REFINER, SDXL, tiny_unet
from tests.tiny_transformers import KINDS as TRANSFORMERS

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

_FIRST, _SECOND, _T5 = 8, 12, 24  # widths of the text encoders


def tiny_clip(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    """A text encoder of CLIP for a tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return kind(config).eval()


def _t5() -> tuple[Any, Any]:
    words = ["▁", "▁a", "▁fox", "▁pizza", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -2.0) for word in words)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_T5, d_kv=8, d_ff=8, num_layers=2, num_heads=2
    )
    return tokenizer, T5EncoderModel(config).eval()


_CHAT = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen: bytes, some words, and messages."""
    words = list(ByteLevel.alphabet())
    merges = [("f", "o"), ("fo", "x"), ("Ġ", "fox"), ("p", "i"), ("pi", "z")]
    words += ["".join(pair) for pair in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: n for n, word in enumerate([*sorted(words), *special])},
        merges=merges,
        model_max_length=131072,
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _qwen3(model_class: Any = Qwen3Model, num_layers: int = 3) -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=_T5,
        intermediate_size=_T5,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, model_class(config).eval()


def tiny_vae(channels: int) -> AutoencoderKL:
    """An autoencoder that halves the sides."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    )


def tiny_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, the second with a projection."""
    tokenizer = build_tokenizer(folder)
    config = {
        **SDXL,
        "cross_attention_dim": _FIRST + _SECOND,
        "projection_class_embeddings_input_dim": 10 + 6 * 4,
    }
    return StableDiffusionXLPipeline(
        vae=tiny_vae(4),
        text_encoder=tiny_clip(tokenizer, _FIRST),
        text_encoder_2=tiny_clip(tokenizer, _SECOND, 10),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(int(torch.initial_seed()), **config),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def tiny_refiner(folder: Path) -> StableDiffusionXLImg2ImgPipeline:
    """The refiner: the second text encoder alone, five sizes."""
    tokenizer = build_tokenizer(folder)
    config = {
        **REFINER,
        "cross_attention_dim": _SECOND,
        "projection_class_embeddings_input_dim": 10 + 5 * 4,
    }
    return StableDiffusionXLImg2ImgPipeline(
        vae=tiny_vae(4),
        text_encoder=None,
        text_encoder_2=tiny_clip(tokenizer, _SECOND, 10),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=tiny_unet(int(torch.initial_seed()), **config),
        scheduler=EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def tiny_sd3(folder: Path, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: two CLIPs with projections, and T5 or not."""
    tokenizer = build_tokenizer(folder)
    t5_tokenizer, t5 = _t5() if with_t5 else (None, None)
    _, config = TRANSFORMERS["sd3"]
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            **{**config, "joint_attention_dim": _T5, "pooled_projection_dim": _FIRST + 6}
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=tiny_clip(tokenizer, _FIRST, _FIRST),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer, _SECOND, 6),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def tiny_flux(folder: Path) -> FluxPipeline:
    """Flux, distilled with guidance: CLIP for the whole text, T5 for its tokens."""
    tokenizer = build_tokenizer(folder)
    t5_tokenizer, t5 = _t5()
    _, config = TRANSFORMERS["flux"]
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=tiny_clip(tokenizer, _FIRST),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            **{**config, "joint_attention_dim": _T5, "pooled_projection_dim": _FIRST}
        ).eval(),
    )


def tiny_chroma(folder: Path) -> ChromaPipeline:
    """Chroma: T5."""
    del folder
    tokenizer, t5 = _t5()
    _, config = TRANSFORMERS["chroma"]
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4),
        text_encoder=t5,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(**{**config, "joint_attention_dim": _T5}).eval(),
    )


def tiny_z_image(folder: Path) -> ZImagePipeline:
    """Z-Image: Qwen3."""
    del folder
    tokenizer, qwen = _qwen3()
    _, config = TRANSFORMERS["z-image"]
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(**{**config, "cap_feat_dim": _T5}).eval(),
    )


def _qwen_vl() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _T5,
        "intermediate_size": _T5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 2, 2],
        },
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": _T5})
    return tokenizer, Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_qwen_image(folder: Path) -> QwenImagePipeline:
    """Qwen-Image: Qwen2.5-VL, and an autoencoder of videos that halves the sides."""
    del folder
    tokenizer, qwen = _qwen_vl()
    _, config = TRANSFORMERS["qwen-image"]
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.5, 0.1, 0.0, 0.3],
        latents_std=[2.0, 1.0, 0.5, 1.5],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(**{**config, "joint_attention_dim": _T5}).eval(),
    )


def tiny_klein(folder: Path) -> Flux2KleinPipeline:
    """FLUX.2 klein: three layers of Qwen3, and an autoencoder that normalises its latents."""
    del folder
    tokenizer, qwen = _qwen3(Qwen3ForCausalLM, num_layers=27)
    _, config = TRANSFORMERS["klein"]
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**{**config, "joint_attention_dim": 3 * _T5}).eval(),
    )


def tiny_pixart(folder: Path) -> PixArtSigmaPipeline:
    """PixArt-sigma: T5."""
    del folder
    tokenizer, t5 = _t5()
    _, config = TRANSFORMERS["pixart"]
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=tiny_vae(4),
        transformer=PixArtTransformer2DModel(**{**config, "caption_channels": _T5}).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def tiny_dit(folder: Path) -> DiTPipeline:
    """DiT: a class instead of a text."""
    del folder
    _, config = TRANSFORMERS["dit"]
    return DiTPipeline(
        transformer=DiTTransformer2DModel(**{**config, "num_embeds_ada_norm": 1000}).eval(),
        vae=tiny_vae(4),
        scheduler=DDIMScheduler(),
        id2label={0: "fox", 1: "pizza"},
    )


PIPELINES: dict[str, Any] = {
    "xl": tiny_xl,
    "refiner": tiny_refiner,
    "sd3": tiny_sd3,
    "sd3 without t5": lambda folder: tiny_sd3(folder, with_t5=False),
    "flux": tiny_flux,
    "chroma": tiny_chroma,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
    "klein": tiny_klein,
    "pixart": tiny_pixart,
    "dit": tiny_dit,
}


def saved_experts(kind: str, root: Path, count: int = 3) -> list[Path]:
    """Folders of pipelines of one kind, with different weights everywhere but in the VAE."""
    folders = []
    for seed in range(count):
        torch.manual_seed(seed)
        pipeline: DiffusionPipeline = PIPELINES[kind](root / "tokenizer")
        folders.append(root / f"expert{seed}")
        pipeline.save_pretrained(folders[-1])
        if kind == "dit":  # as the published folders have it; the library does not write it
            index = folders[-1] / "model_index.json"
            content = json.loads(index.read_text()) | {"id2label": {"0": "fox", "1": "pizza"}}
            index.write_text(json.dumps(content))
    return folders
