"""Training: what learns, what stays, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import afa
from afa.errors import AfaError
from afa.recipe import Recipe, TrainingRecipe
from afa.text import hash_weights
from afa.training import (
    SceneImages,
    denoising_loss,
    seeded,
    train,
    train_aggregators,
    training_scheduler,
)
from afa.training.data import batch_indices, to_pixels
from afa.training.loop import encode_captions, encode_pictures, learning_rate_at
from afa.training.objective import noise_and_target
from afa.weights import hash_expert
from tests.tiny import tiny_pipeline

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)


def recipe(experts: list[Path], **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "experts": [str(expert) for expert in experts],
            "data": {"scenes": {"num_samples": 100}},
            "aggregator": {
                "hidden_size": 8,
                "num_layers": 1,
                "num_heads": 2,
                "norm_num_groups": 4,
            },
            "training": {
                "num_steps": 4,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "num_warmup_steps": 0,
                "checkpoint_every": 1,
                "device": "cpu",
                **training,
            },
        }
    )


def test_a_run_writes_an_ensemble_that_loads(experts: list[Path], tmp_path: Path) -> None:
    before = [hash_expert(e) for e in experts]
    steps = list(train(recipe(experts), tmp_path / "run"))
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert all(s.num_steps == 4 and s.loss > 0 and s.seconds > 0 for s in steps)
    loaded = afa.load_ensemble(tmp_path / "run")
    assert all(
        float(rule.conv_out.weight.detach().abs().max()) > 0 for rule in loaded.unet.aggregators
    )
    assert [hash_expert(e) for e in experts] == before


def test_only_aggregators_change(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    frozen = [pipeline.unet.experts, pipeline.text_encoder, pipeline.vae]
    before, aggregators = [hash_weights(m) for m in frozen], hash_weights(pipeline.unet.aggregators)
    settings = recipe(experts).training
    list(train_aggregators(pipeline, SceneImages(10), settings))
    assert [hash_weights(m) for m in frozen] == before
    assert hash_weights(pipeline.unet.aggregators) != aggregators


def test_stopped_and_continued_is_bit_for_bit_the_same(experts: list[Path], tmp_path: Path) -> None:
    whole = list(train(recipe(experts), tmp_path / "whole"))
    first = list(islice(train(recipe(experts), tmp_path / "parts"), 2))  # as if interrupted
    assert not (tmp_path / "parts" / "config.json").exists()
    rest = list(train(recipe(experts), tmp_path / "parts"))
    assert [s.loss for s in first + rest] == [s.loss for s in whole]
    tensors = [load_file(tmp_path / n / "aggregators.safetensors") for n in ("whole", "parts")]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_a_finished_run_can_be_made_longer(experts: list[Path], tmp_path: Path) -> None:
    list(train(recipe(experts, num_steps=2), tmp_path / "run"))
    assert [s.step for s in train(recipe(experts, num_steps=3), tmp_path / "run")] == [3]


def test_the_length_of_a_cosine_is_fixed(experts: list[Path], tmp_path: Path) -> None:
    cosine = {"learning_rate_schedule": "cosine"}
    list(train(recipe(experts, num_steps=2, **cosine), tmp_path / "run"))
    with pytest.raises(AfaError, match="an earlier run of this recipe"):
        list(train(recipe(experts, num_steps=3, **cosine), tmp_path / "run"))


def test_another_recipe_does_not_touch_the_folder(experts: list[Path], tmp_path: Path) -> None:
    list(train(recipe(experts, num_steps=1), tmp_path / "run"))
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(AfaError, match="an earlier run of this recipe"):
        list(train(recipe(experts, num_steps=1, batch_size=3), tmp_path / "run"))
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_what_cannot_start_leaves_nothing(experts: list[Path], tmp_path: Path) -> None:
    wrong = recipe([*experts, tmp_path / "none"])
    with pytest.raises(AfaError, match="does not exist"):
        list(train(wrong, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_pictures(experts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for n, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / f"{n}.png")
        rows.append(json.dumps({"file_name": f"{n}.png", "text": f"a {colour} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    changed = recipe(experts).model_copy(
        update={"data": recipe(experts).data.model_copy(update={"folder": folder, "scenes": None})}
    )
    assert len(list(train(changed, tmp_path / "run"))) == 4


def test_captions_are_dropped_one_by_one(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def note(pipeline: Any, captions: list[str]) -> torch.Tensor:
        seen.append(captions)
        return encode_captions(pipeline, captions)

    monkeypatch.setattr("afa.training.loop.encode_captions", note)
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    settings = TrainingRecipe(num_steps=20, batch_size=10, caption_dropout=0.3, device="cpu")
    list(train_aggregators(pipeline, SceneImages(50), settings))
    dropped = [sum(not caption for caption in batch) for batch in seen]
    assert 40 <= sum(dropped) <= 80  # 60 expected of 200
    assert any(0 < count < 10 for count in dropped)  # not whole batches at a time


def test_learning_rates() -> None:
    settings = TrainingRecipe(num_steps=10, learning_rate=8.0, num_warmup_steps=4)
    assert [learning_rate_at(n, settings) for n in (0, 1, 3, 4, 9)] == [2, 4, 8, 8, 8]
    cosine = settings.model_copy(update={"learning_rate_schedule": "cosine", "num_warmup_steps": 0})
    assert [learning_rate_at(n, cosine) for n in (0, 5)] == pytest.approx([8, 4])
    assert 0 < learning_rate_at(9, cosine) < 0.3


def test_training_lowers_the_loss(experts: list[Path]) -> None:
    """Mean over the same noise and pictures, before and after."""
    pipeline = afa.load_pipeline(experts, SMALL)
    settings = recipe(experts, num_steps=30, batch_size=4).training
    data = SceneImages(8)
    scheduler = training_scheduler(pipeline.scheduler)

    @torch.no_grad()
    def measure() -> float:
        generator = torch.Generator().manual_seed(5)
        pixels = torch.stack([to_pixels(data[n][0], 16, generator) for n in range(8)])
        clean = encode_pictures(pipeline, pixels, generator)
        text = encode_captions(pipeline, [data[n][1] for n in range(8)])
        return denoising_loss(pipeline.unet, scheduler, clean, text, generator).item()

    before = measure()
    list(train_aggregators(pipeline, data, settings))
    assert measure() < before


def test_a_loss_that_is_not_finite_stops_the_run(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    with torch.no_grad():
        pipeline.unet.experts[0].conv_in.weight.fill_(float("nan"))
    with pytest.raises(AfaError, match="must be finite, at step 1 it is nan"):
        list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))


def test_nothing_to_train(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts)
    with pytest.raises(AfaError, match="no aggregators to train"):
        list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))


def test_a_bad_picture_costs_no_step(experts: list[Path], tmp_path: Path) -> None:
    class Spoilt(SceneImages):
        is_spoilt = True

        def __getitem__(self, index: int) -> tuple[Image.Image, str]:
            if self.is_spoilt and index == spoilt_index:
                raise AfaError("'9.jpg' must be a complete picture")
            return super().__getitem__(index)

    settings = recipe(experts, checkpoint_every=100).training
    spoilt_index = batch_indices(20, 2, 2, 0)[0]  # in the third step
    checkpoint = tmp_path / "checkpoint.pt"
    data = Spoilt(20)
    steps = train_aggregators(fresh(experts), data, settings, checkpoint=checkpoint)
    losses = [next(steps).loss, next(steps).loss]
    with pytest.raises(AfaError, match=r"9\.jpg"):
        next(steps)
    data.is_spoilt = False
    losses += [
        s.loss for s in train_aggregators(fresh(experts), data, settings, checkpoint=checkpoint)
    ]
    whole = [s.loss for s in train_aggregators(fresh(experts), data, settings)]
    assert losses == whole


def fresh(experts: list[Path]) -> Any:
    with seeded(0):
        return afa.load_pipeline(experts, SMALL)


def test_damaged_and_foreign_runs_are_refused(experts: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(recipe(experts, num_steps=2), run))
    with pytest.raises(AfaError, match="num_steps must be at least 2"):
        train_one(recipe(experts, num_steps=1), run)
    assert json.loads((run / "recipe.json").read_text())["training"]["num_steps"] == 2

    checkpoint = (run / "checkpoint.pt").read_bytes()
    for damaged in (checkpoint[:-1000], b"", b"nonsense"):
        (run / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(AfaError, match=r"checkpoint.pt' must be complete"):
            train_one(recipe(experts, num_steps=3), run)
    (run / "checkpoint.pt").write_bytes(checkpoint)
    for content in ("{", "[]"):
        (run / "recipe.json").write_text(content)
        with pytest.raises(AfaError, match=r"recipe.json' must"):
            train_one(recipe(experts, num_steps=3), run)


def train_one(asked: Recipe, run: Path) -> None:
    next(iter(train(asked, run)))


def test_going_on_with_other_weights_is_refused(experts: list[Path], tmp_path: Path) -> None:
    copies = []
    for expert in experts:
        copies.append(tmp_path / expert.name)
        shutil.copytree(expert, copies[-1])
    list(train(recipe(copies, num_steps=1), tmp_path / "run"))
    shutil.rmtree(copies[0] / "unet")
    shutil.copytree(experts[1] / "unet", copies[0] / "unet")
    with pytest.raises(AfaError, match="was trained with experts and autoencoder of SHA-256"):
        train_one(recipe(copies, num_steps=2), tmp_path / "run")


def test_experts_of_another_task_are_refused(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "tokenizer", in_channels=9).save_pretrained(tmp_path / "inpaint")
    with pytest.raises(AfaError, match="these take 9 and give 4"):
        train_one(recipe([tmp_path / "inpaint"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_little_noise_is_not_rounded_away(experts: list[Path]) -> None:
    """In bfloat16 the noise of the first timesteps would vanish."""
    pipeline = afa.load_pipeline(experts, SMALL, torch_dtype=torch.bfloat16)
    pixels = torch.zeros(2, 3, 16, 16)
    clean = encode_pictures(pipeline, pixels, torch.Generator().manual_seed(0))
    assert clean.dtype == torch.float32
    scheduler = training_scheduler(pipeline.scheduler)
    noise = torch.ones_like(clean)
    noisy, _ = noise_and_target(scheduler, torch.zeros_like(clean), noise, torch.tensor([0, 1]))
    expected = (1 - scheduler.alphas_cumprod[:2]).sqrt()
    torch.testing.assert_close(noisy[:, 0, 0, 0], expected)
    seen = []

    def denoiser(noisy: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        seen.append(noisy.dtype)
        return (noisy,)

    text = encode_captions(pipeline, ["a fox"] * 2)
    denoising_loss(denoiser, scheduler, clean, text, torch.Generator().manual_seed(0))
    assert seen == [torch.bfloat16]


def test_half_precision_experts(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL, torch_dtype=torch.bfloat16)
    steps = list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))
    assert len(steps) == 4
    assert all(p.dtype == torch.float32 for p in pipeline.unet.aggregators.parameters())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets(experts: list[Path], kind: str) -> None:
    sampler = afa.load_pipeline(experts[:1]).scheduler
    sampler.register_to_config(prediction_type=kind)
    scheduler = training_scheduler(sampler)
    clean, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    steps = torch.tensor([10, 900])
    noisy, target = noise_and_target(scheduler, clean, noise, steps)
    alpha = scheduler.alphas_cumprod[steps].view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(target, noise if kind == "epsilon" else velocity)


def test_other_objectives_are_refused(experts: list[Path]) -> None:
    sampler = afa.load_pipeline(experts[:1]).scheduler
    sampler.register_to_config(prediction_type="sample")
    with pytest.raises(AfaError, match="came 'sample'"):
        training_scheduler(sampler)
