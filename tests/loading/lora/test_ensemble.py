"""A LoRA that is added to an ensemble later: nothing is left out without a word either."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig

import afa
from tests.lora.models import peft_lora, write
from tests.refusal import refusal
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"](folder / "tokenizer").save_pretrained(folder / "base")
    return afa.load_pipeline([folder / "base"])


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def kohya(layer: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        f"lora_unet_{layer}.lora_down.weight": torch.ones(2, columns),
        f"lora_unet_{layer}.lora_up.weight": torch.ones(rows, 2),
    }


def test_input_layers_of_kohyas_flux(flux: Any, tmp_path: Path) -> None:
    width, channels = flux.transformer.experts[0].x_embedder.weight.shape
    layers = kohya("double_blocks_0_img_attn_proj", 16, 16) | kohya("img_in", width, channels)
    before = names(flux.transformer)
    with refusal("AFA-ENSEMBLE-023", "2", r"'x_embedder\.lora_A\.weight'"):
        flux.load_lora_weights(str(write(tmp_path / "l.safetensors", layers)))
    assert names(flux.transformer) == before


def test_products_in_two_kinds_of_names(flux: Any) -> None:
    """diffusers goes by the first name, and reads none of the other kind."""
    place = "transformer.transformer_blocks.0.attn."
    tensors = {
        f"{place}to_q.lora_A.weight": torch.ones(2, 16),
        f"{place}to_q.lora_B.weight": torch.ones(16, 2),
        f"{place}to_k.lora.down.weight": torch.ones(2, 16),
        f"{place}to_k.lora.up.weight": torch.ones(16, 2),
    }
    with refusal("AFA-ENSEMBLE-023", "2"):
        flux.transformer.load_lora_adapter(tensors, prefix="transformer")


def test_norms_of_flux(flux: Any, tmp_path: Path) -> None:
    place = "transformer.transformer_blocks.0.attn."
    tensors = {
        f"{place}to_q.lora_A.weight": torch.ones(2, 16),
        f"{place}to_q.lora_B.weight": torch.ones(16, 2),
        f"{place}norm_q.weight": torch.ones(8),
    }
    with refusal("AFA-ENSEMBLE-024"):
        flux.load_lora_weights(str(write(tmp_path / "l.safetensors", tensors)))
    flux.unload_lora_weights()
    assert not any("lora" in name for name in names(flux.transformer))


# PEFT asks whether a second LoRA is meant
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_layers_that_the_experts_lack(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", **ODD["two levels"])
    pipeline.save_pretrained(tmp_path / "base")
    ensemble = afa.load_pipeline([tmp_path / "base"])
    state = peft_lora(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))
    right = {f"unet.{key}": tensor for key, tensor in state.items()}
    far = {key.replace("blocks.0", "blocks.7"): tensor for key, tensor in right.items()}
    before = names(ensemble.unet)
    with refusal("AFA-LORA-008", "base's"):
        ensemble.load_lora_weights(str(write(tmp_path / "far.safetensors", {**right, **far})))
    assert names(ensemble.unet) == before
    file = write(tmp_path / "right.safetensors", right)
    ensemble.load_lora_weights(str(file), adapter_name="one")
    ensemble.load_lora_weights(str(file), adapter_name="two")  # beside the first
    added = [name for name in names(ensemble.unet) if ".lora_" in name]
    assert len(added) == 2 * len(right)
