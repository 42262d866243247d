"""`afa merge`: what it says, what it leaves, and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import fails, pickled, run, truncated, wider

UNET = "unet/diffusion_pytorch_model.safetensors"


def write(folder: Path, sources: list[Path], /, method: str = "weighted", **changes: Any) -> Path:
    recipe: dict[str, Any] = {"method": method, "experts": [str(expert) for expert in sources]}
    recipe |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_merge_says_what_it_does_and_how_to_go_on(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = []
    for n, expert in enumerate(experts[:2]):
        strange.append(tmp_path / str(n))
        shutil.copytree(expert, strange[-1])
        tensors = load_file(strange[-1] / UNET)
        save_file({**tensors, "foo.bar": torch.ones(1)}, strange[-1] / UNET)
    recipe = write(tmp_path, strange, weights=[0.25, 0.75])
    assert run("merge", recipe, "--output", tmp_path / "merged") == 0
    said = capsys.readouterr().out
    assert "2 experts (weighted) into 0.00 GB" in said
    assert "unet.foo.bar" in said
    assert "tensors" in said
    assert f"from_pretrained('{tmp_path / 'merged'}')" in said
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["weights"] == [0.25, 0.75]


def test_paths_are_relative_to_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"a.weight": torch.eye(2)}
    for name in ("a", "b", "base"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    names = ["a.safetensors", "./b.safetensors"]
    recipe = write(tmp_path, [], "ties", experts=names, base="base.safetensors", density=1.0)
    output = tmp_path / "merged.safetensors"
    assert run("merge", recipe, "--output", output) == 0
    assert torch.equal(load_file(output)["a.weight"], torch.eye(2))
    assert "ComfyUI" in capsys.readouterr().out


def block_weights(given: Any) -> dict[str, Any]:
    return {"method": "block_weights", "block_weights": given}


@pytest.mark.parametrize(
    ("changes", "code", "value"),
    [
        ({"weights": [0.5, 0.6]}, "AFA-RECIPE-002", "[0.5, 0.6]"),
        ({"weights": [1.0]}, "AFA-RECIPE-002", "1 for 2"),
        ({"wieghts": [0.5, 0.5]}, "AFA-RECIPE-002", "'weights'?"),
        ({"method": "average"}, "AFA-RECIPE-002", "'average'"),
        ({"density": 0.5}, "AFA-RECIPE-002", "density"),
        ({"base": "zoo:base"}, "AFA-RECIPE-002", "base"),
        ({"method": "ties"}, "AFA-RECIPE-002", "base"),
        ({"method": "dare", "base": "zoo:base"}, "AFA-RECIPE-002", "density"),
        ({"method": "block_weights"}, "AFA-RECIPE-002", "block_weights"),
        (block_weights([0.5] * 25), "AFA-RECIPE-002", "25"),
        (block_weights({"mid": "half"}), "AFA-RECIPE-002", "'block_weights'"),
        (block_weights("GRAD"), "AFA-RECIPE-002", "'GRAD_V'?"),
        (block_weights("GRAD_V"), "AFA-MERGE-004", "9"),
        (block_weights({"up.7": [0, 1]}), "AFA-MERGE-005", "'up.7'"),
        ({"experts": []}, "AFA-RECIPE-002", "'experts'"),
        ({"dtype": "int8"}, "AFA-RECIPE-002", "'dtype'"),
        ({"vae": "none"}, "AFA-RECIPE-002", "'vae'"),
        ({"experts": ["zoo:animal"]}, "AFA-ZOO-002", "'zoo:animal'"),
        ({"experts": ["zoo:ensemble"]}, "AFA-LOAD-102", "model_index.json"),
    ],
)
def test_wrong_recipes(
    changes: dict[str, Any],
    code: str,
    value: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(tmp_path, experts[:2], **changes)
    line = fails(capsys, "merge", recipe, "--output", tmp_path / "merged")
    assert code in line
    assert value in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def single_file(experts: list[Path], folder: Path) -> Path:
    save_file({"a.weight": torch.eye(2)}, folder / "single.safetensors")
    return folder / "single.safetensors"


def another_family(experts: list[Path], folder: Path) -> Path:
    shutil.copytree(experts[0], folder / "kolors")
    index = {"_class_name": "KolorsPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "kolors" / "model_index.json").write_text(json.dumps(index))
    return folder / "kolors"


def lora(experts: list[Path], folder: Path) -> Path:
    tensors = {"lora_unet_x.lora_down.weight": torch.eye(2), "lora_unet_x.alpha": torch.ones(1)}
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def missing(experts: list[Path], folder: Path) -> Path:
    return folder / "nowhere"


@pytest.mark.parametrize(
    ("make", "code", "value"),
    [
        (missing, "AFA-LOAD-079", "nowhere"),
        (pickled, "AFA-LOAD-096", "model.ckpt"),
        (truncated, "AFA-LOAD-092", "truncated"),
        (wider, "AFA-MERGE-010", "'unet."),
        (single_file, "AFA-MERGE-027", "single.safetensors"),
        (lora, "AFA-MERGE-041", "'lora_unet_x."),
        (another_family, "AFA-MODEL-006", "KolorsPipeline"),
    ],
)
def test_wrong_experts(
    make: Any,
    code: str,
    value: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(tmp_path, [experts[0], make(experts, tmp_path)])
    before = sorted(tmp_path.iterdir())
    line = fails(capsys, "merge", recipe, "--output", tmp_path / "merged")
    assert code in line
    assert value in line
    assert sorted(tmp_path.iterdir()) == before


def test_an_inpainting_folder_is_merged_checked_and_drawn(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts[0], tmp_path / "inpainting")
    tensors = load_file(tmp_path / "inpainting" / UNET)
    more = torch.randn(8, 5, 3, 3)
    tensors["conv_in.weight"] = torch.cat([tensors["conv_in.weight"], more], 1)
    save_file(tensors, tmp_path / "inpainting" / UNET)
    config = tmp_path / "inpainting" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    recipe = write(tmp_path, [tmp_path / "inpainting", experts[1]])
    assert run("check", recipe, "--no-weights") == 0
    assert run("merge", recipe, "--output", tmp_path / "merged") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search("from 4 to 9 input channels: unet.conv_in", said)
    found = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").conv_in.weight
    torch.testing.assert_close(found[:, 4:], more / 2)


def test_wrong_outputs(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, experts)
    file = tmp_path / "merged.safetensors"
    assert "AFA-MERGE-028" in fails(capsys, "merge", recipe, "--output", file)
    file.write_bytes(b"mine")
    assert "AFA-MERGE-026" in fails(capsys, "merge", recipe, "--output", file)
    assert "AFA-MERGE-026" in fails(capsys, "merge", recipe, "--output", tmp_path)
    assert file.read_bytes() == b"mine"
    recipe = write(tmp_path, [single_file(experts, tmp_path)])
    assert "AFA-MERGE-028" in fails(capsys, "merge", recipe, "--output", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
