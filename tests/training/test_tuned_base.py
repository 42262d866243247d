"""The tuned base: it learns, sees what aggregators see, and goes on after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from afa.training import FolderImages, SceneImages, TrainingRecipe, TrainStep
from afa.training.tuned_base import require_same_run, tune_base
from tests.refusal import refusal
from tests.training.test_split import folder_of

DATA = SceneImages(8, seed=1)


def settings(**changes: Any) -> TrainingRecipe:
    values = {
        "num_steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "num_warmup_steps": 1,
        "caption_dropout": 0.5,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return TrainingRecipe(**{**values, **changes})


def tune(expert: Path, output: Path, **changes: Any) -> list[TrainStep]:
    return list(tune_base(str(expert), DATA, settings(**changes), output))


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def test_unet_and_text_encoder_learn_and_the_rest_stays(
    experts: list[Path], tmp_path: Path
) -> None:
    steps = tune(experts[0], tmp_path / "tuned")
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    for part, changes in (("unet", True), ("text_encoder", True), ("vae", False)):
        before, after = weights(experts[0], part), weights(tmp_path / "tuned", part)
        assert before.keys() == after.keys()
        moved = [not torch.equal(before[key], after[key]) for key in before]
        assert any(moved) is changes, part
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a fox", num_inference_steps=1).images


def test_it_gets_better_at_what_it_sees(experts: list[Path], tmp_path: Path) -> None:
    losses = [step.loss for step in tune(experts[0], tmp_path / "tuned", num_steps=40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_it_sees_the_batches_and_the_noise_of_the_aggregators(
    experts: list[Path], tmp_path: Path
) -> None:
    import afa
    from afa.training import train_aggregators

    small = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
    pipeline = afa.load_pipeline([experts[0]], small)
    first = next(iter(train_aggregators(pipeline, DATA, settings())))
    tuned = tune(experts[0], tmp_path / "tuned")[0]
    # before the first update one expert in an ensemble predicts what it predicts alone
    assert first.loss == pytest.approx(tuned.loss, rel=1e-5)


def test_stopped_and_started_again_it_is_the_same(experts: list[Path], tmp_path: Path) -> None:
    tune(experts[0], tmp_path / "whole")
    run = tune_base(str(experts[0]), DATA, settings(), tmp_path / "parts")
    for _ in range(3):  # one step after the checkpoint, which is taken again
        next(run)
    del run
    assert not (tmp_path / "parts" / "model_index.json").exists()
    assert [step.step for step in tune(experts[0], tmp_path / "parts")] == [3, 4, 5, 6]
    for part in ("unet", "text_encoder"):
        whole, parts = (weights(tmp_path / name, part) for name in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_is_refused(experts: list[Path], tmp_path: Path) -> None:
    with refusal("AFA-TRAIN-054", "float32"):
        tune(experts[0], tmp_path / "tuned", expert_dtype="bfloat16")
    tune(experts[0], tmp_path / "tuned")
    with refusal("AFA-TRAIN-055"):
        tune(experts[1], tmp_path / "tuned")
    with refusal("AFA-TRAIN-055"):
        tune(experts[0], tmp_path / "tuned", seed=1)
    other = SceneImages(8, seed=2)
    with refusal("AFA-TRAIN-055"):
        list(tune_base(str(experts[0]), other, settings(), tmp_path / "tuned"))
    for checkpoint in (tmp_path / "tuned" / "checkpoints").iterdir():
        checkpoint.write_bytes(b"PK")
    with refusal("AFA-MACHINE-002"):
        tune(experts[0], tmp_path / "tuned")


def test_other_pictures_or_another_configuration_are_another_run(
    experts: list[Path], tmp_path: Path
) -> None:
    own = shutil.copytree(experts[0], tmp_path / "own")
    folder_of(tmp_path / "data", 3)
    quick = settings(num_steps=1)

    def tuned() -> list[TrainStep]:
        data = FolderImages(tmp_path / "data")
        return list(tune_base(str(own), data, quick, tmp_path / "tuned"))

    assert len(tuned()) == 1
    assert tuned() == []
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "1.png")
    with refusal("AFA-TRAIN-055"):
        tuned()
    with refusal("AFA-TRAIN-055"):
        require_same_run(FolderImages(tmp_path / "data"), quick, tmp_path / "tuned")
    folder_of(tmp_path / "data", 3)
    require_same_run(FolderImages(tmp_path / "data"), quick, tmp_path / "tuned")
    config = own / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    with refusal("AFA-TRAIN-055"):
        tuned()


def test_a_lora_alone_is_trained_and_merged(experts: list[Path], tmp_path: Path) -> None:
    """Its changes have the rank, only layers inside the blocks change, and a stop is no matter."""
    whole = list(tune_base(str(experts[0]), DATA, settings(), tmp_path / "a", lora_rank=2))
    assert len(whole) == 6
    linear = 0
    for part in ("unet", "text_encoder"):
        before, after = weights(experts[0], part), weights(tmp_path / "a", part)
        assert before.keys() == after.keys()
        for key, old in before.items():
            change = after[key] - old
            if not change.any():
                continue
            assert "block" in key or ".layers." in key
            assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-4) <= 2, key
            linear += 1
    assert linear > 10

    steps = tune_base(str(experts[0]), DATA, settings(), tmp_path / "b", lora_rank=2)
    for step in steps:
        if step.step == 3:
            steps.close()  # type: ignore[attr-defined]
            break
    list(tune_base(str(experts[0]), DATA, settings(), tmp_path / "b", lora_rank=2))
    for part in ("unet", "text_encoder"):
        one, other = weights(tmp_path / "a", part), weights(tmp_path / "b", part)
        assert all(torch.equal(one[key], other[key]) for key in one)
    with refusal("AFA-TRAIN-055", "lora_rank"):
        next(tune_base(str(experts[0]), DATA, settings(), tmp_path / "a"))
