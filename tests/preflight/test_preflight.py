"""Experts that cannot be ensembled are refused before any work, each with its reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.loading.compare import compare
from afa.loading.facts import read_facts
from afa.loading.single_file.load import Described
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts


def changed(expert: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of an expert whose configuration says something else."""
    shutil.copytree(expert, copy)
    config = copy / file
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return copy


def refused(experts: list[Path], code: str, *values: str) -> None:
    with refusal(code, *values) as error:
        afa.load_pipeline(experts)
    assert "\n" not in str(error.value)


def test_stable_diffusion_with_xl(experts: list[Path], tmp_path: Path) -> None:
    (other,) = saved_experts("xl", tmp_path, count=1)
    refused(
        [experts[0], other],
        "AFA-LOAD-002",
        r"'.*expert0' is a Stable Diffusion XL model, '.*expert0' is a Stable Diffusion model",
    )


def test_noise_with_logits(experts: list[Path], tmp_path: Path) -> None:
    file = "scheduler/scheduler_config.json"
    other = changed(experts[1], tmp_path / "other", file, prediction_type="logits")
    refused([experts[0], other], "AFA-LOAD-010", "prediction_type = logits", "has epsilon")


def test_four_latent_channels_with_sixteen(experts: list[Path], tmp_path: Path) -> None:
    other = changed(experts[1], tmp_path / "other", "vae/config.json", latent_channels=16)
    refused([experts[0], other], "AFA-LOAD-003", "latent_channels = 16, .* has 4")


def test_autoencoders_of_two_scales(experts: list[Path], tmp_path: Path) -> None:
    other = changed(experts[1], tmp_path / "other", "vae/config.json", scaling_factor=0.13025)
    refused([experts[0], other], "AFA-LOAD-003", "scaling_factor = 0.13025, .*expert0' has 0.18215")


def test_an_expert_twice(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    shutil.copytree(experts[0], copy)
    refused([experts[0], experts[1], copy], "AFA-LOAD-001", "'.*renamed' .* '.*expert0'")
    pipeline = afa.load_pipeline([experts[0], copy], allow_duplicates=True)
    assert len(pipeline.unet.experts) == 2


def test_text_encoders_that_one_lacks(tmp_path: Path) -> None:
    whole = saved_experts("sd3", tmp_path / "whole", count=1)
    torch.manual_seed(5)
    without = saved_experts("sd3 without t5", tmp_path / "without", count=1)
    refused(
        [*whole, *without],
        "AFA-LOAD-005",
        r".*without.* has the text encoders text_encoder, text_encoder_2, '.*' has .*_3;",
    )


def test_tokenizers_of_two_lengths(experts: list[Path], tmp_path: Path) -> None:
    """The first one's length counts for all; an encoder that cannot take it is refused."""
    file = "tokenizer/tokenizer_config.json"
    short = changed(experts[1], tmp_path / "short", file, model_max_length=12)
    long = changed(experts[1], tmp_path / "long", file, model_max_length=500)
    refused([long, experts[0]], "AFA-LOAD-008", "model_max_length = 500, .* 24 tokens")
    for pair, said in (
        ([experts[0], short], r"'.*short' has model_max_length = 12 \(first expert: 24\)"),
        ([short, experts[0]], r"'.*expert0' has model_max_length = 24 \(first expert: 12\)"),
    ):
        facts = [read_facts(str(each), Described(each)) for each in pair]
        (found,) = compare(facts)
        assert (found.code, found.level) == ("AFA-LOAD-009", "warning")
        assert re.search(said, found.text)
    pipeline = afa.load_pipeline([short, experts[0]])
    embedding, _ = pipeline.encode_prompt("a fox", "cpu", 1, False)
    assert embedding.shape[1] == 12


def test_tokenizers_that_fill_up_otherwise(experts: list[Path], tmp_path: Path) -> None:
    file = "tokenizer/tokenizer_config.json"
    other = changed(experts[1], tmp_path / "other", file, pad_token="<|startoftext|>")
    facts = [read_facts(str(each), Described(each)) for each in (experts[0], other)]
    (found,) = compare(facts)
    assert "pad_token = '<|startoftext|>'" in found.text


@pytest.mark.parametrize(
    ("kind", "counted"), [("sd3", {"tokenizer"}), ("xl", {"tokenizer", "tokenizer_2"})]
)
def test_whose_length_counts(kind: str, counted: set[str], tmp_path: Path) -> None:
    (expert,) = saved_experts(kind, tmp_path, count=1)
    assert read_facts("a", Described(expert)).settings.keys() == counted
