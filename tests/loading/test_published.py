"""Folders of the published code: loaded as they are, with the numbers that code gave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import afa
from afa.cli import main
from afa.loading.inspection import describe
from afa.loading.planned import plan_of_ensemble
from afa.loading.published import hash_published
from afa.preflight.run import look
from tests.refusal import refusal
from tests.test_oracle import ORACLE, part
from tests.tiny import tiny_pipeline

_WIDTH = 32  # of the oracle's text


def text_encoder(seed: int, vocabulary: int) -> CLIPTextModel:
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The oracle's experts and aggregators, laid out as `save_pretrained` of that code does."""
    facts = json.loads((ORACLE / "n2.json").read_text())
    tensors = {k: t.float() for k, t in load_file(ORACLE / "n2.safetensors").items()}
    root = tmp_path / "published"
    unets = []
    for n in range(2):
        unets.append(UNet2DConditionModel(**facts["unet_config"], sample_size=8))
        unets[-1].load_state_dict(part(tensors, f"unet.{n}."))
    pipeline = tiny_pipeline(tmp_path / "tokenizer")
    vocabulary = len(pipeline.tokenizer)
    pipeline.register_modules(unet=unets[0], text_encoder=text_encoder(0, vocabulary))
    pipeline.save_pretrained(root)
    unets[1].save_pretrained(root / "additional_unet_0")
    text_encoder(1, vocabulary).save_pretrained(root / "additional_text_encoder_0")
    for place in (root / "unet", root / "additional_unet_0"):  # its own class's name
        config = json.loads((place / "config.json").read_text())
        config["_class_name"] = "UNet2DConditionAggregatorModel"
        (place / "config.json").write_text(json.dumps(config))
    index = json.loads((root / "model_index.json").read_text())
    index["unet"] = ["models.modules", "UNet2DConditionAggregatorModel"]
    (root / "model_index.json").write_text(json.dumps(index))
    for n, config in enumerate(facts["aggregator_config"]):
        place = root / f"aggregator_{n}"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        weights = {k: t.contiguous() for k, t in part(tensors, f"aggregator.{n}.").items()}
        save_file(weights, place / "aggregator.safetensors")
    counts = {"num_models": 2, "num_aggregators": len(facts["aggregator_config"])}
    (root / "model_config.json").write_text(json.dumps(counts))
    return root


def test_it_computes_what_the_published_code_did(folder: Path) -> None:
    tensors = load_file(ORACLE / "n2.safetensors")
    pipeline: Any = afa.load_ensemble(folder)
    texts = tensors["input.encoder_hidden_states"].float()
    output = pipeline.unet(
        tensors["input.sample"].float(), tensors["input.timestep"], torch.cat(list(texts), dim=-1)
    ).sample
    torch.testing.assert_close(output, tensors["output.sample"].float(), rtol=0, atol=1e-5)
    # each expert has its own text encoder
    ids = torch.tensor([[3, 4, 5]])
    joined = pipeline.text_encoder(ids)[0]
    assert joined.shape == (1, 3, 2 * _WIDTH)
    vocabulary = len(pipeline.tokenizer)
    second = text_encoder(1, vocabulary).eval()(ids)[0]
    torch.testing.assert_close(joined[..., _WIDTH:], second, rtol=0, atol=1e-5)


def test_commands_take_it_as_any_ensemble(folder: Path, tmp_path: Path) -> None:
    facts = describe(folder)
    assert facts["kind"] == "ensemble of the published code"
    assert (facts["experts"], facts["aggregators"]) == (2, 9)
    assert facts["aggregator"] == "hidden_size 64, num_layers 2, num_heads 4"
    command = ["generate", str(folder), "a fox", "--output", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--weights"])
    assert not stop.value.code
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    with refusal("AFA-LOAD-020"):
        afa.save_ensemble(afa.load_ensemble(folder), tmp_path / "saved")
    with refusal("AFA-LOAD-023"):
        afa.load_ensemble(folder, vae=folder)


def _changed(file: Path) -> None:
    """Add 1 to the first tensor of a safetensors file."""
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_every_expert_is_told_by_its_own_weights(folder: Path, part: str) -> None:
    before = [r.identity for r in afa.load_ensemble(folder).unet.provenance.experts]
    assert len(set(before)) == 2
    (file,) = (folder / f"additional_{part}_0").glob("*.safetensors")
    _changed(file)
    after = [r.identity for r in afa.load_ensemble(folder).unet.provenance.experts]
    assert after[0] == before[0]
    assert after[1] not in before


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("aggregator_3/config.json", {"num_attn_heads": 8}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("additional_unet_0/config.json", {"norm_eps": 1e-3}),
    ],
)
def test_its_hash_sees_what_is_no_weight(folder: Path, file: str, changes: Any) -> None:
    before = hash_published(folder)
    assert hash_published(folder) == before
    _wrong(folder, file, **changes)
    assert hash_published(folder) != before


def test_the_estimate_is_of_all_its_experts_and_aggregators(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what this process takes already differs from one moment to the next
    monkeypatch.setattr("afa.preflight.machine.program_bytes", lambda _: 0)
    plan = plan_of_ensemble(folder, torch.float32, torch.device("cpu"))
    (group,) = plan.groups
    loaded: Any = afa.load_ensemble(folder)
    assert group.num_experts == len(loaded.unet.experts) == 2
    assert group.encoder_sets == len(loaded.text_encoder.encoders) == 2
    assert group.aggregators is not None
    own = loaded.unet.aggregators[3].config
    for name in ("hidden_size", "num_layers", "num_heads", "hidden_ratio", "min_scale"):
        assert getattr(group.aggregators, name) == getattr(own, name), name
    estimate = look(plan, with_weights=False).estimates["ensemble"]
    alone = replace(group, aggregators=None, num_experts=None, encoder_sets=None)
    less = look(replace(plan, groups=[alone]), with_weights=False).estimates["ensemble"]
    assert estimate.takes > less.takes


def test_additional_experts_are_looked_into(folder: Path) -> None:
    file = folder / "additional_unet_0" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] * torch.nan}, file)
    report = look(plan_of_ensemble(folder, torch.float32, torch.device("cpu")))
    assert any("'published/additional_unet_0'" in finding.text for finding in report.errors)


def test_a_folder_without_a_text_encoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["text_encoder"], index["tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with refusal("AFA-LOAD-053"):
        afa.load_ensemble(folder)


def _without(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)


def _wrong(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def _cut(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-100])


def _seven_heads(folder: Path) -> None:
    for n in range(9):
        _wrong(folder, f"aggregator_{n}/config.json", num_attn_heads=7)


@pytest.mark.parametrize(
    ("damage", "code", "value"),
    [
        (lambda f: _without(f, "additional_unet_0"), "AFA-LOAD-101", "additional_unet_0"),
        (lambda f: _without(f, "aggregator_3"), "AFA-FILE-004", "aggregator_3"),
        (lambda f: _wrong(f, "model_config.json", num_models=-1), "AFA-LOAD-057", "'num_models'"),
        (lambda f: _wrong(f, "model_config.json", num_aggregators=8), "AFA-LOAD-052", "9 sites"),
        (lambda f: _wrong(f, "aggregator_2/config.json", hidden_size=32), "AFA-LOAD-055", "32"),
        (lambda f: _wrong(f, "aggregator_2/config.json", extra=1), "AFA-LOAD-057", "'extra'"),
        (lambda f: _wrong(f, "aggregator_2/config.json", num_experts=3), "AFA-LOAD-054", "its 2"),
        (_seven_heads, "AFA-LOAD-056", "aggregator.hidden_size"),
        (
            lambda f: _wrong(f, "additional_unet_0/config.json", block_out_channels=[3, 5]),
            "AFA-MACHINE-002",
            "complete diffusion model",
        ),
        (
            lambda f: _cut(f, "additional_unet_0/diffusion_pytorch_model.safetensors"),
            "AFA-LOAD-092",
            "diffusion_pytorch_model.safetensors",
        ),
        (
            lambda f: (f / "additional_text_encoder_0/config.json").unlink(),
            "AFA-MACHINE-002",
            "complete diffusion model",
        ),
        (
            lambda f: _cut(f, "aggregator_2/aggregator.safetensors"),
            "AFA-LOAD-092",
            "aggregator_2/aggregator.safetensors",
        ),
        (
            lambda f: shutil.copy(
                f / "aggregator_0/aggregator.safetensors", f / "aggregator_8/aggregator.safetensors"
            ),
            "AFA-MACHINE-002",
            "site conv_out",
        ),
    ],
)
def test_damaged_folders_are_one_line(folder: Path, damage: Any, code: str, value: str) -> None:
    damage(folder)
    with refusal(code, value) as raised:
        afa.load_ensemble(folder)
    assert "\n" not in str(raised.value)
