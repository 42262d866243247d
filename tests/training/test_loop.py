"""Training: what learns, what stays, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import afa
from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of
from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.loading.weights import hash_expert
from afa.training import (
    Checkpoints,
    Recipe,
    SceneImages,
    Stopped,
    TrainingRecipe,
    TrainStep,
    denoising_loss,
    train,
    train_aggregators,
)
from afa.training.encoding import encode_captions
from afa.training.examples import LiveExamples
from afa.training.loop import learning_rate_at
from afa.training.order import Purpose, sample_at
from afa.training.transform import Transform
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import saved_experts
from tests.training.runs import SMALL, fresh, recipe, steps_of

pytestmark = pytest.mark.slow


def test_a_run_writes_an_ensemble_that_loads(experts: list[Path], tmp_path: Path) -> None:
    before = [hash_expert(e) for e in experts]
    steps = list(steps_of(recipe(experts), tmp_path / "run"))
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
    whole = list(steps_of(recipe(experts), tmp_path / "whole"))
    first = list(islice(steps_of(recipe(experts), tmp_path / "parts"), 2))  # as if interrupted
    assert not (tmp_path / "parts" / "config.json").exists()
    rest = list(steps_of(recipe(experts), tmp_path / "parts"))
    assert [s.loss for s in first + rest] == [s.loss for s in whole]
    tensors = [load_file(tmp_path / n / "aggregators.safetensors") for n in ("whole", "parts")]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_a_finished_run_can_be_made_longer(experts: list[Path], tmp_path: Path) -> None:
    list(steps_of(recipe(experts, num_steps=2), tmp_path / "run"))
    assert [s.step for s in steps_of(recipe(experts, num_steps=3), tmp_path / "run")] == [3]


def test_the_length_of_a_cosine_is_fixed(experts: list[Path], tmp_path: Path) -> None:
    cosine = {"learning_rate_schedule": "cosine"}
    list(steps_of(recipe(experts, num_steps=2, **cosine), tmp_path / "run"))
    with refusal("AFA-TRAIN-046"):
        list(steps_of(recipe(experts, num_steps=3, **cosine), tmp_path / "run"))


def test_another_recipe_does_not_touch_the_folder(experts: list[Path], tmp_path: Path) -> None:
    list(steps_of(recipe(experts, num_steps=1), tmp_path / "run"))
    before = contents(tmp_path / "run")
    with refusal("AFA-TRAIN-046"):
        list(steps_of(recipe(experts, num_steps=1, weight_decay=0.5), tmp_path / "run"))
    assert contents(tmp_path / "run") == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_start_leaves_nothing(experts: list[Path], tmp_path: Path) -> None:
    wrong = recipe([*experts, tmp_path / "none"])
    with refusal("AFA-LOAD-079"):
        list(steps_of(wrong, tmp_path / "run"))
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
    assert len(list(steps_of(changed, tmp_path / "run"))) == 4


def test_captions_are_dropped_one_by_one(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def note(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        seen.append(captions)
        return encode_captions(pipeline, captions)

    monkeypatch.setattr("afa.training.examples.encode_captions", note)
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    settings = TrainingRecipe(num_steps=20, batch_size=10, caption_dropout=0.3, device="cpu")
    list(train_aggregators(pipeline, SceneImages(50), settings))
    dropped = [sum(not caption for caption in batch) for batch in seen]
    assert 40 <= sum(dropped) <= 80  # 60 expected of 200
    assert any(0 < count < 10 for count in dropped)  # not whole batches at a time


def test_training_lowers_the_loss(experts: list[Path]) -> None:
    """Mean over the same noise and pictures, before and after."""
    pipeline = afa.load_pipeline(experts, SMALL)
    settings = recipe(experts, num_steps=30, batch_size=4).training
    data = SceneImages(8)
    examples = LiveExamples(
        pipeline, data, Transform(16), seed=0, samples=range(8), purpose=Purpose.VALIDATION
    )

    @torch.no_grad()
    def measure() -> float:
        batch = next(examples.batches([range(8)]))
        process = forward_process(pipeline.scheduler)
        predict = partial(
            conditioning_of(pipeline).predict,
            pipeline,
            pipeline.unet,
            conditions=batch.conditions,
        )
        losses = denoising_loss(predict, process, batch.clean, noise=batch.noise, time=batch.time)
        assert losses.shape == (8,)
        return losses.mean().item()

    before = measure()
    list(train_aggregators(pipeline, data, settings))
    assert measure() < before


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_batches_are_one_large_batch(experts: list[Path], accumulated: int) -> None:
    """The same samples and draws in every step; float32 sums in another order."""
    seen: list[list[float]] = []
    weights = []
    for size, count in ((4, 1), (4 // accumulated, accumulated)):
        pipeline = fresh(experts)
        settings = recipe(experts, num_steps=5, batch_size=size).training
        settings = settings.model_copy(update={"gradient_accumulation_steps": count})
        seen.append([s.loss for s in train_aggregators(pipeline, SceneImages(20), settings)])
        weights.append(torch.cat([p.flatten() for p in pipeline.unet.aggregators.parameters()]))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_learning_rates() -> None:
    settings = TrainingRecipe(num_steps=10, learning_rate=8.0, num_warmup_steps=4)
    assert [learning_rate_at(n, settings) for n in (0, 1, 3, 4, 9)] == [2, 4, 8, 8, 8]
    cosine = settings.model_copy(update={"learning_rate_schedule": "cosine", "num_warmup_steps": 0})
    assert [learning_rate_at(n, cosine) for n in (0, 5)] == pytest.approx([8, 4])
    assert 0 < learning_rate_at(9, cosine) < 0.3


def test_a_loss_that_is_not_finite_stops_the_run(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    with torch.no_grad():
        pipeline.unet.experts[0].conv_in.weight.fill_(float("nan"))
    with refusal("AFA-TRAIN-036", "1"):
        list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    experts: list[Path], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    pipeline = fresh(experts)
    settings = recipe(experts, checkpoint_every=2, num_steps=9).training
    steps = train_aggregators(pipeline, SceneImages(10), settings, checkpoints=checkpoints)
    next(steps), next(steps), next(steps)
    kept = contents(tmp_path)
    with torch.no_grad():
        pipeline.unet.experts[0].conv_in.weight.fill_(float("inf"))
    with refusal("AFA-TRAIN-051", "4", "step-00000002"):
        next(steps)
    assert contents(tmp_path) == kept


def test_nothing_to_train(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts)
    with refusal("AFA-TRAIN-048"):
        list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))


def train_one(asked: Recipe, run: Path) -> None:
    next(iter(steps_of(asked, run)))


def test_going_on_with_other_weights_is_refused(experts: list[Path], tmp_path: Path) -> None:
    copies = []
    for expert in experts:
        copies.append(tmp_path / expert.name)
        shutil.copytree(expert, copies[-1])
    list(steps_of(recipe(copies, num_steps=1), tmp_path / "run"))
    shutil.rmtree(copies[0] / "unet")
    shutil.copytree(experts[1] / "unet", copies[0] / "unet")
    with refusal("AFA-TRAIN-052", "SHA-256"):
        train_one(recipe(copies, num_steps=2), tmp_path / "run")


def test_experts_of_another_task_are_refused(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "tokenizer", in_channels=9).save_pretrained(tmp_path / "inpaint")
    with refusal("AFA-LOAD-044", "9", "4"):
        train_one(recipe([tmp_path / "inpaint"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_precision_experts(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL, torch_dtype=torch.bfloat16)
    steps = list(train_aggregators(pipeline, SceneImages(10), recipe(experts).training))
    assert len(steps) == 4
    assert all(p.dtype == torch.float32 for p in pipeline.unet.aggregators.parameters())


def test_a_bad_picture_costs_no_step(experts: list[Path], tmp_path: Path) -> None:
    class Spoilt(SceneImages):
        is_spoilt = True

        def __getitem__(self, index: int) -> tuple[Image.Image, str]:
            if self.is_spoilt and index == spoilt:
                raise AfaError("AFA-TRAIN-001", "'9.jpg' must have a caption")
            return super().__getitem__(index)

    settings = recipe(experts, checkpoint_every=100).training
    spoilt = sample_at(2 * settings.batch_size, 20, settings.seed)  # in the third step
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    data = Spoilt(20)
    steps = train_aggregators(fresh(experts), data, settings, checkpoints=checkpoints)
    losses = [next(steps).loss, next(steps).loss]
    with refusal("AFA-TRAIN-001", r"9\.jpg"):
        next(steps)
    data.is_spoilt = False
    rest = train_aggregators(fresh(experts), data, settings, checkpoints=checkpoints)
    losses += [step.loss for step in rest]
    assert losses == [step.loss for step in train_aggregators(fresh(experts), data, settings)]


def test_damaged_and_foreign_runs_are_refused(experts: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(steps_of(recipe(experts, num_steps=2), run))
    with refusal("AFA-TRAIN-050", "2"):
        train_one(recipe(experts, num_steps=1), run)
    assert json.loads((run / "recipe.json").read_text())["training"]["num_steps"] == 2

    place = run / "checkpoints" / "step-00000002.safetensors"
    whole = place.read_bytes()
    for damaged in (whole[:-1000], b"", b"nonsense"):
        place.write_bytes(damaged)
        with refusal("AFA-MACHINE-002", "02.safetensors", "step-"):
            train_one(recipe(experts, num_steps=3), run)
    place.write_bytes(whole)
    for content, code in (("{", "AFA-FILE-004"), ("[]", "AFA-FILE-005")):
        (run / "recipe.json").write_text(content)
        with refusal(code, "recipe.json"):
            train_one(recipe(experts, num_steps=3), run)


def test_a_damaged_checkpoint_that_is_deleted_costs_the_steps_since_the_one_before(
    experts: list[Path], tmp_path: Path
) -> None:
    whole = list(steps_of(recipe(experts), tmp_path / "whole"))
    run = tmp_path / "run"
    list(islice(steps_of(recipe(experts), run), 3))
    (run / "checkpoints" / "step-00000003.safetensors").unlink()
    assert [s.loss for s in steps_of(recipe(experts), run)] == [s.loss for s in whole[2:]]


def test_another_number_of_samples_to_a_step_is_another_run(
    experts: list[Path], tmp_path: Path
) -> None:
    list(steps_of(recipe(experts, num_steps=2, batch_size=4), tmp_path / "run"))
    with refusal("AFA-TRAIN-053", "4", "3"):
        train_one(recipe(experts, num_steps=3, batch_size=3), tmp_path / "run")
    shared = recipe(experts, num_steps=3, batch_size=2, gradient_accumulation_steps=2)
    assert [step.step for step in steps_of(shared, tmp_path / "run")] == [3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_in_half_precision_go_on_bit_for_bit(
    experts: list[Path], tmp_path: Path, dtype: str
) -> None:
    """The average, and the loss scale of float16, are part of what goes on."""
    changes: Any = {"expert_dtype": dtype, "ema_decay": 0.9}
    whole = list(steps_of(recipe(experts, **changes), tmp_path / "whole"))
    first = list(islice(steps_of(recipe(experts, **changes), tmp_path / "parts"), 2))
    rest = list(steps_of(recipe(experts, **changes), tmp_path / "parts"))
    assert [s.loss for s in first + rest] == [s.loss for s in whole]
    tensors = [load_file(tmp_path / n / "aggregators.safetensors") for n in ("whole", "parts")]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors[0].values())


def test_what_is_saved_at_the_end_is_the_average(experts: list[Path], tmp_path: Path) -> None:
    list(steps_of(recipe(experts, ema_decay=0.5, num_warmup_steps=0), tmp_path / "run"))
    saved = load_file(tmp_path / "run" / "aggregators.safetensors")
    found = Checkpoints(tmp_path / "run" / "checkpoints").read()
    assert found is not None
    last = found.part("aggregators")
    assert any(not torch.equal(saved[key], last[key]) for key in saved)
    distance = max(float((saved[key] - last[key]).abs().max()) for key in saved)
    assert 0 < distance < 4 * 4 * 1e-2  # four steps of at most the learning rate or so


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "offload_experts"])
def test_what_saves_memory_changes_nothing(
    experts: list[Path], tmp_path: Path, switch: str
) -> None:
    changes: Any = {switch: True}
    plain = [s.loss for s in steps_of(recipe(experts), tmp_path / "plain")]
    changed = [s.loss for s in steps_of(recipe(experts, **changes), tmp_path / "changed")]
    assert changed == pytest.approx(plain, rel=1e-6)


def test_nothing_is_kept_for_what_needs_no_gradient(experts: list[Path]) -> None:
    """The graph of the loss begins at the first aggregator: no part before it is in it."""
    pipeline = fresh(experts)
    seen: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            seen[name] = tensor.requires_grad

        return hook

    unet = pipeline.unet.experts[0]
    parts = {
        "conv_in": unet.conv_in,
        "time embedding": unet.time_embedding,
        "text encoder": pipeline.text_encoder,
        "autoencoder": pipeline.vae.encoder,
        "first block": unet.down_blocks[0].resnets[0],
    }
    for name, part in parts.items():
        part.register_forward_hook(note(name))
    settings = recipe(experts, num_steps=1).training
    list(train_aggregators(pipeline, SceneImages(10), settings))
    assert seen == {**dict.fromkeys(parts, False), "first block": True}


def test_a_stop_saves_and_goes_on(experts: list[Path], tmp_path: Path) -> None:
    whole = [s.loss for s in steps_of(recipe(experts), tmp_path / "whole")]
    asked = recipe(experts, checkpoint_every=100)
    count = iter(range(10))
    losses = []
    events = train(asked, tmp_path / "run", should_stop=lambda: next(count) == 1)
    for _ in range(2):
        step = next(events)
        assert isinstance(step, TrainStep)
        losses.append(step.loss)
    with pytest.raises(Stopped) as stop:
        next(events)
    assert (stop.value.step, stop.value.num_steps) == (2, 4)
    assert not (tmp_path / "run" / "config.json").exists()
    losses += [s.loss for s in steps_of(asked, tmp_path / "run")]
    assert losses == whole


def test_min_snr_weighs_the_loss(experts: list[Path]) -> None:
    settings = recipe(experts, num_steps=2).training
    plain = [s.loss for s in train_aggregators(fresh(experts), SceneImages(10), settings)]
    weighed = settings.model_copy(update={"min_snr_gamma": 1e-3})
    other = [s.loss for s in train_aggregators(fresh(experts), SceneImages(10), weighed)]
    assert 0 < other[0] < plain[0]


def test_velocity_loss_weighs_high_noise(experts: list[Path]) -> None:
    settings = recipe(experts, num_steps=2).training
    plain = [s.loss for s in train_aggregators(fresh(experts), SceneImages(10), settings)]
    weighed = settings.model_copy(update={"velocity_loss": True})
    other = [s.loss for s in train_aggregators(fresh(experts), SceneImages(10), weighed)]
    assert other[0] > 1.5 * plain[0], "an error of noise at high noise is a large one of velocity"
    with pytest.raises(ValueError, match="both min_snr_gamma and velocity_loss"):
        recipe(experts, velocity_loss=True, min_snr_gamma=5)


@pytest.mark.nightly
def test_regularisers_pull_as_they_should(experts: list[Path]) -> None:
    """Without them these weights harden and leave experts out; the loss shown is the objective's
    alone."""
    ends = {}
    for name in ("none", "entropy_weight", "balance_weight"):
        changes: Any = {} if name == "none" else {name: 10.0}
        settings = recipe(experts, num_steps=20, **changes).training
        pipeline = fresh(experts)
        with torch.no_grad():  # away from the uniform weights that it begins with
            for rule in pipeline.unet.aggregators:
                rule.conv_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        *_, last = train_aggregators(pipeline, SceneImages(10), settings)
        assert last.routing is not None
        assert last.loss < 2
        shares = last.routing.shares
        balance = -torch.xlogy(shares, shares).sum(1).mean() / torch.tensor(3.0).log()
        ends[name] = float(last.routing.entropy.mean()), float(balance)
    assert max(ends["none"]) < 0.6
    assert ends["entropy_weight"][0] > 0.9
    assert ends["balance_weight"][1] > 0.9


@pytest.mark.parametrize(
    ("kind", "aggregator", "code"),
    [
        ("xl", {}, "AFA-TRAIN-059"),
        ("xl", {"timestep": False}, None),
        ("sd", {"prompt": False}, "AFA-TRAIN-060"),
        ("sd", {}, None),
    ],
)
def test_noise_on_the_prompt_is_refused_where_it_does_nothing(
    kind: str, aggregator: dict[str, bool], code: str | None, experts: list[Path], tmp_path: Path
) -> None:
    folders = experts if kind == "sd" else saved_experts(kind, tmp_path, 2)
    asked = recipe(folders, prompt_noise=0.5, num_steps=2)
    changed: Any = aggregator
    asked = asked.model_copy(update={"aggregator": replace(asked.aggregator, **changed)})
    if code is not None:
        with refusal(code):
            list(steps_of(asked, tmp_path / "run"))
        return
    plain = asked.model_copy(
        update={"training": asked.training.model_copy(update={"prompt_noise": 0.0})}
    )
    losses = [
        [step.loss for step in steps_of(each, tmp_path / f"run-{n}")]
        for n, each in enumerate((asked, asked, plain))
    ]
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[2][0], "untrained aggregators do not use the prompt"
    assert losses[0][1] != losses[2][1]
