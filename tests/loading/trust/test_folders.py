"""Model folders that are more than data: nothing they name is looked at, nothing is built."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import afa
from afa.errors import AfaError
from afa.loading.single_file.identify import config_folder, configs
from afa.loading.trust.folders import check_folder
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts


@pytest.fixture
def copy(experts: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(experts[0], tmp_path / "copy"))


def say(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("name", configs())
def test_published_configurations_are_taken(name: str) -> None:
    check_folder(config_folder(name))


@pytest.mark.parametrize(
    "kind", ["xl", "sd3", "flux", "chroma", "z-image", "qwen-image", "pixart", "dit"]
)
def test_tiny_ones_are_taken(kind: str, tmp_path: Path) -> None:
    check_folder(saved_experts(kind, tmp_path, count=1)[0])


@pytest.mark.fault(
    "a hostile configuration",
    "any model",
    how="code, kernels from a hub, unlimited sizes, in every file",
    holds="refused in one line before anything is built",
)
@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "has auto_map"),
        ("tokenizer/tokenizer_config.json", {"auto_map": ["a", "b"]}, "has auto_map"),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "has auto_map"),
        ("model_index.json", {"custom_pipeline": "evil/pipeline"}, "has custom_pipeline"),
        ("text_encoder/config.json", {"trust_remote_code": True}, "has trust_remote_code"),
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "evil/kernel', which"),
        ("text_encoder/config.json", {"_attn_implementation": {"": "evil/k"}}, "evil/k"),
        ("text_encoder/config.json", {"nested": {"attn_implementation": "a/b"}}, "'a/b', which"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block .* 1000000000.* 200"),
        ("unet/config.json", {"block_out_channels": [8] * 1000}, "channels .* 1000 entries"),
        ("unet/config.json", {"block_out_channels": [10**12]}, "block_out_channels .* 10000000000"),
        ("unet/config.json", {"cross_attention_dim": 10**400}, "cross_attention_dim .* 1000"),
        ("unet/config.json", {"sample_size": float("nan")}, "sample_size .* nan"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers .* 1000000"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**15}, "max_position_emb"),
        ("text_encoder/config.json", {"hidden_size": [[10**15]]}, "hidden_size .* 10000000000"),
        ("vae/config.json", {"down_block_types": ["x"] * 10**5}, "has 100000 entries"),
        ("unet/config.json", {"padding": "x" * 2_000_000}, "maximum is 1000000"),
    ],
)
def test_what_a_configuration_may_not_say(
    file: str, changes: dict[str, Any], message: str, copy: Path
) -> None:
    say(copy / file, **changes)
    with pytest.raises(AfaError, match=message) as error:
        afa.load_pipeline([copy])
    assert str(copy / file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_that_is_too_deep(copy: Path) -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"a": deep}
    say(copy / "unet" / "config.json", extra=deep)
    with refusal("AFA-FILE-004", "64"):
        afa.load_pipeline([copy])
    (copy / "unet" / "config.json").write_text('{"a":' * 100_000)
    with refusal("AFA-FILE-004"):
        afa.load_pipeline([copy])


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_an_adapter_whose_base_is_somewhere_else(part: str, copy: Path) -> None:
    place = copy / part / "adapter_config.json"
    place.write_text(json.dumps({"base_model_name_or_path": "/etc", "peft_type": "LORA"}))
    with refusal("AFA-LOAD-083"):
        afa.load_pipeline([copy])


@pytest.mark.parametrize(
    "shard", ["../../other/model.safetensors", "/etc/passwd", "..\\x.safetensors", "model.bin"]
)
@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_an_index_names_safetensors_beside_it_alone(part: str, shard: str, copy: Path) -> None:
    index = copy / f"{part}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": shard}}))
    with refusal("AFA-LOAD-086"):
        afa.load_pipeline([copy])


def test_an_index_that_is_none(copy: Path) -> None:
    (copy / "unet" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    with refusal("AFA-LOAD-085"):
        afa.load_pipeline([copy])


def test_a_tokenizer_cannot_name_files_elsewhere(copy: Path, tmp_path: Path) -> None:
    """What a tokenizer's configuration says of files is not followed; its own are read."""
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"secret": 0}))
    say(copy / "tokenizer" / "tokenizer_config.json", vocab_file=str(secret))
    tokenizer = afa.load_pipeline([copy]).tokenizer
    assert "secret" not in tokenizer.get_vocab()
    assert "fox</w>" in tokenizer.get_vocab()


def test_pipes_in_a_folder_are_not_waited_for(copy: Path) -> None:
    (copy / "unet" / "config.json").unlink()
    os.mkfifo(copy / "unet" / "config.json")
    with refusal("AFA-FILE-004"):
        afa.load_pipeline([copy])


@pytest.mark.parametrize("name", ["../experts", "/etc", "..", "a/b"])
def test_a_part_is_a_name_and_no_path(name: str, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index[name] = ["transformers", "CLIPTextModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert afa.load_pipeline([copy]).unet is not None  # it is left out


def test_a_folder_that_lends_parts_or_describes_files_is_held_to_the_same(copy: Path) -> None:
    from afa.loading.single_file.load import described_by

    say(copy / "text_encoder" / "config.json", attn_implementation="evil/kernel")
    with refusal("AFA-LOAD-088"):
        described_by(copy)
    with refusal("AFA-LOAD-088"):
        afa.load_pipeline([copy], parts=[copy])
