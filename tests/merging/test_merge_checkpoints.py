"""Checkpoints merged tensor by tensor: the same numbers as in memory, whole files or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import afa
from afa.loading.weights import hash_expert
from afa.machine.hashes import hash_file
from afa.merging import MergeRecipe, merge_checkpoints, plan_merge
from afa.merging.in_memory import merge_models, weighted_merge
from tests.single_file import original_layout
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import saved_experts

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {
    "weighted": {"weights": [0.7, 0.3]},
    "add_difference": {},
    "slerp": {"weights": [0.4, 0.6]},
    "ties": {"density": 0.4, "majority_sign": "frequency"},
    "dare": {"density": 0.4, "seed": 5},
    "block_weights": {"block_weights": {"mid": [0.1, 0.9], "text_encoder": [0.8, 0.2]}},
}
NEEDS_BASE = ("add_difference", "ties", "dare")


def recipe(
    experts: list[Path], method: str = "weighted", base: Path | None = None, **settings: Any
) -> MergeRecipe:
    sources = {"experts": [str(e) for e in experts], "base": base and str(base)}
    return MergeRecipe.model_validate({"method": method, **sources, **settings})


def merge(output: Path, *arguments: Any, **settings: Any) -> Path:
    for _ in merge_checkpoints(recipe(*arguments, **settings), output):
        pass
    return output


def copied(folder: Path, expert: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of an expert with other tensors in its U-Net."""
    shutil.copytree(expert, folder)
    save_file({**load_file(folder / UNET), **tensors}, folder / UNET)
    return folder


@pytest.fixture(scope="module")
def single_files(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for n, expert in enumerate(experts):
        tensors = original_layout(StableDiffusionPipeline.from_pretrained(expert))
        save_file(tensors, folder / f"{n}.safetensors", {"format": "pt"})
    return [folder / f"{n}.safetensors" for n in range(len(experts))]


@pytest.mark.parametrize("method", SETTINGS)
def test_streamed_is_in_memory(method: str, experts: list[Path], tmp_path: Path) -> None:
    base = experts[2] if method in NEEDS_BASE else None
    asked = recipe(experts[:2], method, base, **SETTINGS[method])
    list(merge_checkpoints(asked, tmp_path / "merged"))
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        models = [kind.from_pretrained(expert / part) for expert in experts]
        expected = merge_models(
            models[:2],
            asked.build(),
            base=models[2] if method in NEEDS_BASE else None,
            part=part,  # type: ignore[arg-type]
        )
        state = kind.from_pretrained(tmp_path / "merged" / part).state_dict()
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name], tensor), name
    # the autoencoder is the first expert's, all else is copied
    vae = "vae/diffusion_pytorch_model.safetensors"
    expected_vae = load_file(experts[0] / vae)
    merged_vae = load_file(tmp_path / "merged" / vae)
    assert all(torch.equal(merged_vae[name], tensor) for name, tensor in expected_vae.items())


def test_a_merged_folder_is_a_stock_pipeline(experts: list[Path], tmp_path: Path) -> None:
    merged = merge(tmp_path / "deep" / "merged", experts)
    pipeline = StableDiffusionPipeline.from_pretrained(merged)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a fox", num_inference_steps=1, output_type="np").images
    assert picture.shape == (1, 16, 16, 3)
    record = json.loads((merged / "merge.json").read_text())
    assert record["method"] == "weighted"
    assert record["afa_version"] == afa.__version__
    assert [e["sha256"] for e in record["experts"]] == [hash_expert(expert) for expert in experts]
    assert record["unknown_tensors"] == []
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_a_merged_file_loads_as_its_experts_do(
    single_files: list[Path], experts: list[Path], tmp_path: Path
) -> None:
    settings = {"block_weights": {"default": [0.5, 0.5], "conv_in": [0, 1], "text_encoder": [1, 0]}}
    merged = merge(
        tmp_path / "merged.safetensors", single_files[:2], "block_weights", None, **settings
    )
    pipeline = afa.load_pipeline([merged], config=experts[0])
    ours = pipeline.unet.experts[0].state_dict()
    theirs = [UNet2DConditionModel.from_pretrained(e / "unet").state_dict() for e in experts[:2]]
    assert torch.equal(ours["conv_in.weight"], theirs[1]["conv_in.weight"])
    torch.testing.assert_close(
        ours["conv_out.weight"], (theirs[0]["conv_out.weight"] + theirs[1]["conv_out.weight"]) / 2
    )
    tensors, first = load_file(merged), load_file(single_files[0])
    for name, tensor in first.items():
        if name.startswith(("first_stage_model.", "cond_stage_model.")):
            assert torch.equal(tensors[name], tensor)
    with safe_open(merged, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    record = json.loads(metadata["afa_merge"])
    assert record["experts"][1]["sha256"] == hash_file(single_files[1])


def test_autoencoders_are_merged_on_request(experts: list[Path], tmp_path: Path) -> None:
    merged = merge(tmp_path / "merged", experts[:2], vae="merge")
    vae = "vae/diffusion_pytorch_model.safetensors"
    ours, a, b = (load_file(folder / vae) for folder in (merged, *experts[:2]))
    name = "encoder.conv_in.weight"
    assert not torch.equal(a[name], b[name])
    torch.testing.assert_close(ours[name], (a[name] + b[name]) / 2)


def test_halves_shards_and_older_names_are_read(experts: list[Path], tmp_path: Path) -> None:
    half, sharded = tmp_path / "half", tmp_path / "sharded"
    pipeline = StableDiffusionPipeline.from_pretrained(experts[0])
    pipeline.to(dtype=torch.float16).save_pretrained(half, variant="fp16")
    shutil.copytree(experts[1], sharded)
    (sharded / UNET).unlink()
    unet = UNet2DConditionModel.from_pretrained(experts[1] / "unet")
    unet.save_pretrained(sharded / "unet", max_shard_size="20KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    text = sharded / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{k}": t for k, t in load_file(text).items()}, text)

    merged = merge(tmp_path / "merged", [half, sharded], dtype="float32")
    assert sorted(f.name for f in (merged / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    expected = (load_file(experts[0] / UNET)["conv_in.weight"].half() + unet.conv_in.weight) / 2
    pipeline = StableDiffusionPipeline.from_pretrained(merged)
    found = pipeline.unet.conv_in.weight
    assert found.dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.float32  # the first expert's says float16
    torch.testing.assert_close(found, expected)
    again = merge(tmp_path / "again", [half, sharded])
    assert load_file(again / UNET)["conv_in.weight"].dtype == torch.float16


def test_strangers_are_merged_and_named(experts: list[Path], tmp_path: Path) -> None:
    folders = []
    for value in (1.0, 3.0):
        stranger = {"foo.bar": torch.tensor(value)}
        folders.append(copied(tmp_path / str(value), experts[0], stranger))
    merged = merge(tmp_path / "merged", folders)
    assert load_file(merged / UNET)["foo.bar"].item() == 2
    assert json.loads((merged / "merge.json").read_text())["unknown_tensors"] == ["unet.foo.bar"]


def test_what_not_all_have_is_the_first_ones(single_files: list[Path], tmp_path: Path) -> None:
    first, second = (load_file(file) for file in single_files[:2])
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    first |= {positions: torch.arange(24.0), "model_ema.decay": torch.tensor(0.5)}
    save_file(first, tmp_path / "first.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    plan = plan_merge(recipe(files), tmp_path / "merged.safetensors")
    assert sorted(plan.kept) == [positions, "model_ema.decay"]
    assert plan.unknown == []
    tensors = load_file(merge(tmp_path / "merged.safetensors", files))
    assert torch.equal(tensors[positions], torch.arange(24.0))
    assert tensors["model_ema.decay"].item() == 0.5


def test_a_base_without_optional_tensors_will_do(single_files: list[Path], tmp_path: Path) -> None:
    base = {**load_file(single_files[2]), "model_ema.decay": torch.tensor(0.5)}
    save_file(base, tmp_path / "base.safetensors")
    asked = recipe(single_files[:2], "add_difference", tmp_path / "base.safetensors")
    assert "model_ema.decay" not in {
        t.name for t in plan_merge(asked, tmp_path / "m.safetensors").tensors
    }


def test_progress_reaches_its_end(experts: list[Path], tmp_path: Path) -> None:
    steps = list(merge_checkpoints(recipe(experts), tmp_path / "merged"))
    assert [step.stage for step in steps[:4]] == ["hash"] * 4  # the autoencoder is an input as well
    assert steps[3].num_bytes == steps[3].total_bytes
    assert steps[-1].num_bytes == steps[-1].total_bytes
    assert steps[-1].num_tensors == steps[-1].total_tensors == len(steps) - 4


def test_the_result_does_not_depend_on_the_order_of_tensors(
    experts: list[Path], tmp_path: Path
) -> None:
    # one more tensor ahead of all others
    more = [copied(tmp_path / str(n), experts[n], {"a": torch.randn(9)}) for n in range(3)]
    for name, (a, b, base) in (("plain", experts), ("more", more)):
        merge(tmp_path / name, [a, b], "dare", base, density=0.5)
    ours, theirs = load_file(tmp_path / "more" / UNET), load_file(tmp_path / "plain" / UNET)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_components_that_are_not_there_are_not_named(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer")
    pipeline.save_pretrained(tmp_path / "expert")
    index = tmp_path / "expert" / "model_index.json"
    content = json.loads(index.read_text())
    content["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    content["requires_safety_checker"] = True
    index.write_text(json.dumps(content))  # as a hub download without it
    merged = merge(tmp_path / "merged", [tmp_path / "expert"])
    assert StableDiffusionPipeline.from_pretrained(merged).safety_checker is None


def test_components_are_folders_inside(experts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(experts[0], tmp_path / "in" / "expert")
    (tmp_path / "in" / "secret").mkdir()
    (tmp_path / "in" / "secret" / "key.txt").write_text("mine")
    index = tmp_path / "in" / "expert" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "../secret": ["a", "b"]}))
    merge(tmp_path / "out" / "merged", [tmp_path / "in" / "expert"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    config = {**ODD["two levels"], "cross_attention_dim": 32, "addition_embed_type": "text_time"}
    config |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    pipelines = []
    for seed in range(2):
        parts = tiny_pipeline(tmp_path / "tokenizer", seed=seed, **config).components
        second = CLIPTextModelWithProjection(parts["text_encoder"].config)
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        pipelines.append(
            StableDiffusionXLPipeline(
                **{name: parts[name] for name in names},
                text_encoder_2=second,
                tokenizer_2=parts["tokenizer"],
            )
        )
        pipelines[-1].save_pretrained(tmp_path / str(seed))
    weights = {"default": [1, 0], "text_encoder_2": [0, 1], "conv_in": [0, 1]}
    experts = [tmp_path / "0", tmp_path / "1"]
    merged = merge(tmp_path / "m", experts, "block_weights", None, block_weights=weights)
    ours = StableDiffusionXLPipeline.from_pretrained(merged)
    for part, place, expert in (
        ("text_encoder", "final_layer_norm.bias", 0),
        ("text_encoder_2", "text_projection.weight", 1),
        ("unet", "add_embedding.linear_1.weight", 1),
        ("unet", "conv_out.weight", 0),
    ):
        state = getattr(ours, part).state_dict()
        assert torch.equal(state[place], getattr(pipelines[expert], part).state_dict()[place])


@pytest.mark.parametrize("kind", ["sd3", "chroma", "z-image", "klein", "qwen-image", "pixart"])
def test_folders_of_transformers(kind: str, tmp_path: Path) -> None:
    folders = saved_experts(kind, tmp_path, 2)
    recipe = MergeRecipe(method="weighted", experts=[str(folder) for folder in folders])
    list(merge_checkpoints(recipe, tmp_path / "merged"))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    experts = [DiffusionPipeline.from_pretrained(folder) for folder in folders]
    parts = [name for name in merged.components if name.startswith(("transformer", "text_enc"))]
    assert len(parts) == (4 if kind == "sd3" else 2)
    for name in parts:
        expected = weighted_merge([expert.components[name] for expert in experts]).state_dict()
        for key, tensor in merged.components[name].state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)
    assert torch.equal(merged.vae.decoder.conv_in.weight, experts[0].vae.decoder.conv_in.weight)
