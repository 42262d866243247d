"""Tiny models in memory with LoRAs on them, and what the libraries make of both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.references import ExpertReference
from afa.loading.expert_source import ExpertSource
from afa.loading.loaded import Expert
from afa.loading.lora import lora_expert

if TYPE_CHECKING:
    from torch import Tensor


def expert_of(pipeline: Any) -> Expert:
    """The parts of a pipeline, as `load_expert` gives them."""
    parts = pipeline.components
    return Expert(
        ExpertReference("base", "0"),
        kind_of_pipeline(pipeline),
        type(pipeline).__name__,
        denoiser_of(pipeline),
        {k: v for k, v in parts.items() if k.startswith("text_encoder") and v is not None},
        {},
        pipeline.scheduler,
        Path(),
    )


def with_lora(pipeline: Any, file: Path, scale: float = 1.0) -> Any:
    """The same pipeline with a LoRA as an expert has it."""
    expert = lora_expert(expert_of(pipeline), ExpertSource("base", lora=str(file), scale=scale))
    return _rebuilt(pipeline, {expert.kind.denoiser: expert.denoiser, **expert.text_encoders})


def _rebuilt(pipeline: Any, parts: dict[str, Any]) -> Any:
    others = ("feature_extractor", "image_encoder", "safety_checker")
    rest = {k: v for k, v in pipeline.components.items() if k not in others}
    return build_pipeline(type(pipeline).__name__, {**rest, **parts}, {})


def by_diffusers(pipeline: Any, file: Path, scale: float = 1.0) -> Any:
    """The same, loaded and fused by the library."""
    denoiser = kind_of_pipeline(pipeline).denoiser
    own = _rebuilt(pipeline, {denoiser: copy.deepcopy(denoiser_of(pipeline))})
    own.load_lora_weights(str(file))
    own.fuse_lora(components=[denoiser], lora_scale=scale)
    return plain(denoiser_of(own))


def plain(model: Any) -> dict[str, Tensor]:
    """The weights of a model without the layers of PEFT around them."""
    for layer in list(model.modules()):
        if isinstance(layer, BaseTunerLayer):
            assert layer.merged
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def assert_equal(ours: Any, theirs: dict[str, Tensor], before: Any, atol: float = 1e-6) -> None:
    """The same weights, of which some differ from the base's."""
    state, base = ours.state_dict(), before.state_dict()
    assert state.keys() == theirs.keys()
    assert any(not torch.equal(state[key], base[key]) for key in state)
    for key, tensor in theirs.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=atol, msg=key)


def peft_lora(model: Any, config: LoraConfig, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA with random numbers in PEFT's names; the model is left as it was."""
    own = copy.deepcopy(model)
    own.add_adapter(config)
    torch.manual_seed(seed)
    state = get_peft_model_state_dict(own)
    return {
        key: (tensor * (0.5 + torch.rand_like(tensor)))
        if "magnitude" in key
        else torch.randn_like(tensor) * 0.2
        for key, tensor in sorted(state.items())
    }


def write(
    file: Path, tensors: dict[str, Tensor], config: LoraConfig | None = None, part: str = ""
) -> Path:
    """A file; PEFT's configuration goes into its metadata for a part, or beside it for none."""
    metadata = {"format": "pt"}
    if config is not None:
        settings = config.to_dict()
        settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        if part:
            described = {f"{part}.{key}": value for key, value in settings.items()}
            metadata["lora_adapter_metadata"] = json.dumps(described)
        else:
            (file.parent / "adapter_config.json").write_text(json.dumps(settings))
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, file, metadata)
    return file
