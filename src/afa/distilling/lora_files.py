"""Write a student's adapters as LoRA files, in the naming of diffusers and in that of kohya.

Both are plain safetensors with alpha equal to the rank, so that a strength of 1 is the student.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import kind_of_pipeline
from afa.loading.tensor_files import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from afa.distilling.student import Student

LORA, DIFFUSERS = "lora.safetensors", "lora-diffusers.safetensors"
_CLIP = "text_model."
#: kohya's prefixes by component, for one text encoder and for several
_PREFIXES = {
    "unet": ("lora_unet", "lora_unet"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2", "lora_te2"),
}


def write_loras(student: Student, folder: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write the LoRA files of a student.

    For U-Nets, `lora.safetensors` has kohya's names, which all programs load. A second file has the
    names of diffusers, of which ComfyUI ignores those of attention layers. For transformers, where
    kohya's names are not defined for layers of diffusers, the first file has the names of
    diffusers, which ComfyUI loads.

    Args:
        student: with adapters.
        folder: of the files.
        metadata: of both files.

    Returns: the files.
    """
    assert student.rank is not None, "it has adapters"
    kind = kind_of_pipeline(student.pipeline)
    adapters, rank = _published(student), student.rank
    common = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", **metadata}
    settings: dict[str, Any] = {}
    for part, layers in adapters.items():
        # PEFT matches the end of names, so these are found in any release of transformers
        targets = sorted(layer.removeprefix(_CLIP) for layer in layers)
        config = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        settings |= {f"{part}.{key}": value for key, value in config.items()}
    is_unet = kind.denoiser in _PREFIXES
    place = folder / (DIFFUSERS if is_unet else LORA)
    described = {**common, "lora_adapter_metadata": json.dumps(settings)}
    write_file(place, diffusers_tensors(adapters), described)
    if not is_unet:
        return [place]
    other = folder / LORA
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(rank))}),
    }
    several = "text_encoder_2" in student.pipeline.components
    write_file(other, kohya_tensors(adapters, rank, several=several), {**common, **entries})
    return [other, place]


def _published(student: Student) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Return a student's adapters by the layer names of published files.

    Those of CLIP start with `text_model.`, which recent releases of transformers leave out.
    """
    return {
        part: {
            f"{_CLIP}{layer.removeprefix(_CLIP)}" if student.is_clip(part) else layer: factors
            for layer, factors in layers.items()
        }
        for part, layers in student.adapters().items()
    }


def diffusers_tensors(
    adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
) -> dict[str, Tensor]:
    """Name factors as diffusers does; the scale is in the metadata.

    Args:
        adapters: see `Student.adapters`.
    """
    return {
        f"{part}.{layer}.lora_{side}.weight": tensor.contiguous()
        for part, layers in adapters.items()
        for layer, factors in layers.items()
        for side, tensor in zip("AB", factors, strict=True)
    }


def kohya_tensors(
    adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], rank: int, *, several: bool
) -> dict[str, Tensor]:
    """Name factors as kohya's scripts do, with an alpha for each layer.

    Args:
        adapters: see `Student.adapters`.
        rank: of all of them, and their alpha.
        several: whether the pipeline has several text encoders.
    """
    found: dict[str, Tensor] = {}
    for part, layers in adapters.items():
        prefix = _PREFIXES[part][several]
        for layer, (down, up) in layers.items():
            name = f"{prefix}_{layer.replace('.', '_')}"
            found[f"{name}.lora_down.weight"] = down.contiguous()
            found[f"{name}.lora_up.weight"] = up.contiguous()
            found[f"{name}.alpha"] = down.new_tensor(float(rank))
    return found
