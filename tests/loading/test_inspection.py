"""What `afa inspect` says of everything it may be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import afa
from afa.errors import AfaError
from afa.loading.inspection import describe
from afa.machine.hashes import hash_file
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)


def test_pipeline_folder(experts: list[Path]) -> None:
    facts = describe(experts[0])
    loaded = afa.load_pipeline([experts[0]])
    assert (facts["kind"], facts["family"]) == ("pipeline folder", "unet")
    assert facts["class"] == "StableDiffusionPipeline"
    assert facts["sha256"] == loaded.unet.provenance.experts[0].sha256
    parts = [*loaded.unet.experts[0].parameters(), *loaded.text_encoder.parameters()]
    assert facts["parameters"] == sum(p.numel() for p in parts)
    assert [s.split()[0] for s in facts["sites"]] == [s.name for s in loaded.unet.sites]


def test_ensemble_folder(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    facts = describe(afa.save_ensemble(pipeline, tmp_path / "ensemble"))
    assert (facts["kind"], facts["family"]) == ("ensemble", "unet")
    own = sum(p.numel() for p in pipeline.unet.aggregators.parameters())
    assert facts["aggregator_parameters"] == own
    assert facts["sites"] == [s.name for s in pipeline.unet.sites]
    assert [e["sha256"] for e in facts["experts"]] == [
        r.sha256 for r in pipeline.unet.provenance.experts
    ]


def test_an_ensemble_without_parameters(experts: list[Path], tmp_path: Path) -> None:
    folder = afa.save_ensemble(afa.load_pipeline(experts), tmp_path / "ensemble")
    facts = describe(folder)
    assert (facts["aggregator"], facts["aggregator_parameters"]) == ("type mean", 0)
    assert afa.load_ensemble(folder).unet.sites


def test_stable_diffusion_15_by_its_configuration_alone(tmp_path: Path) -> None:
    """The paper's "about 50 million" at 25 sites, from a 1 KB file and without any weights."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": 768,
        "block_out_channels": [320, 640, 1280, 1280],
        "sample_size": 64,
        "attention_head_dim": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = describe(tmp_path)
    assert len(facts["sites"]) == 25
    assert facts["denoiser_parameters"] == 859_520_964
    assert round(facts["aggregator_parameters_for_3_experts"] / 1e6, 2) == 45.13


def test_a_family_that_cannot_be_ensembled_is_still_described(tmp_path: Path) -> None:
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "addition_embed_type": "image",
        "encoder_hid_dim": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = describe(tmp_path)
    assert facts["denoiser_parameters"] > 0
    assert "addition_embed_type = 'image'" in facts["refused"]
    (tmp_path / "config.json").write_text("[")
    with refusal("AFA-FILE-004"):
        describe(tmp_path)


def test_single_files(tmp_path: Path) -> None:
    file = tmp_path / "expert.safetensors"
    tensors = original_layout(tiny_pipeline(tmp_path / "tokenizer"))
    save_file(tensors, file)
    facts = describe(file)
    assert facts["layout"] == "Stable Diffusion, original layout"
    assert facts["sha256"] == hash_file(file)
    assert facts["parameters"] == sum(t.numel() for t in tensors.values())
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 3)}, lora)
    assert describe(lora)["layout"] == "LoRA"


@pytest.mark.parametrize("name", ["expert.ckpt", "notes.txt"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(AfaError, match="safetensors"):
        describe(tmp_path / name)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with refusal("AFA-LOAD-029"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with refusal("AFA-LOAD-029"):
        describe(tmp_path)
