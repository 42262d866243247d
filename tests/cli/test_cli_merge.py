"""`afa merge`: what it says, what it leaves, and one line for every mistake."""

from __future__ import annotations

import json
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
    assert "merged like the others: unet.foo.bar" in said
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.5, 0.6]}, "wrong: the weights of this merge must be one per expert, summ"),
        ({"weights": [1.0]}, "must have as many weights as experts, came 1 for 2"),
        ({"wieghts": [0.5, 0.5]}, "did you mean 'weights'?"),
        ({"method": "average"}, "'method': input should be 'weighted'"),
        ({"density": 0.5}, "must leave density out with method weighted; it is for ties, dare"),
        ({"base": "zoo:base"}, "must leave base out with method weighted"),
        ({"method": "ties"}, "must have a base with method ties"),
        ({"method": "dare", "base": "zoo:base"}, "must have a density with method dare"),
        ({"method": "block_weights"}, "must have block_weights"),
        ({"method": "block_weights", "block_weights": [0.5] * 25}, "came 25. Where base alpha"),
        ({"method": "block_weights", "block_weights": {"mid": "half"}}, "must be a preset's name"),
        ({"method": "block_weights", "block_weights": "GRAD"}, "did you mean 'GRAD_V'?"),
        ({"method": "block_weights", "block_weights": "GRAD_V"}, "this one has 19: conv_in"),
        ({"method": "block_weights", "block_weights": {"up.7": [0, 1]}}, "names 'up.7'"),
        ({"experts": []}, "'experts'"),
        ({"dtype": "int8"}, "'dtype'"),
        ({"vae": "none"}, "'vae'"),
        ({"experts": ["zoo:animal"]}, "A shipped name must be one of"),
        ({"experts": ["zoo:ensemble"]}, "must be a diffusers pipeline"),
    ],
)
def test_wrong_recipes(
    changes: dict[str, Any],
    message: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(tmp_path, experts[:2], **changes)
    assert message in fails(capsys, "merge", recipe, "--output", tmp_path / "merged")
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
    ("make", "message"),
    [
        (missing, "does not exist"),
        (pickled, "is a pickle, which can run code"),
        (truncated, "must be a complete safetensors file"),
        (wider, "must share one architecture: 'unet."),
        (single_file, "must have one layout: "),
        (lora, "lora.safetensors' is a LoRA (it has 'lora_unet_x."),
        (another_family, "is a KolorsPipeline. Other families are not supported"),
    ],
)
def test_wrong_experts(
    make: Any,
    message: str,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(tmp_path, [experts[0], make(experts, tmp_path)])
    before = sorted(tmp_path.iterdir())
    assert message in fails(capsys, "merge", recipe, "--output", tmp_path / "merged")
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
    assert "Padded with zeros to 9 input channels, where a checkpoint has 4: unet.conv_in" in said
    found = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").conv_in.weight
    torch.testing.assert_close(found[:, 4:], more / 2)


def test_wrong_outputs(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, experts)
    file = tmp_path / "merged.safetensors"
    assert "a folder; the output is" in fails(capsys, "merge", recipe, "--output", file)
    file.write_bytes(b"mine")
    assert "must be new" in fails(capsys, "merge", recipe, "--output", file)
    assert "must be new" in fails(capsys, "merge", recipe, "--output", tmp_path)
    assert file.read_bytes() == b"mine"
    recipe = write(tmp_path, [single_file(experts, tmp_path)])
    assert "a .safetensors file" in fails(capsys, "merge", recipe, "--output", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
