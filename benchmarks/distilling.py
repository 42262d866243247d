"""Measure what recording adds to drawing, and a student's step to a plain training step.

    python -m benchmarks.distilling

The teacher is the bundled ensemble, the student the zoo's base. Both ratios are measured in one
process, in turn: a recorded batch after a drawn one, and a student's step after a step of a plain
loop, which has the same model, optimizer, batch and loss, with all tensors in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.distilling.passes import Trajectories, passes_of
from afa.distilling.predictions import RecordedExamples, Source
from afa.distilling.recipe import DistillRecipe
from afa.distilling.recording import read_rows, record_predictions
from afa.distilling.student import Student, load_student
from afa.distilling.teacher import Teacher
from afa.evaluation.work import draw
from afa.training.cache import TextCache
from afa.training.engine import Engine
from afa.training.trainer import Trainer
from benchmarks.rounds import ratio

_STEPS = 8  # of a picture


def recipe_of(folder: Path, num_steps: int) -> DistillRecipe:
    """Return a small distillation of the bundled ensemble into the base."""
    return DistillRecipe.model_validate(
        {
            "teacher": {"ensemble": "zoo:ensemble"},
            "student": {"init": "zoo:base"},
            "trajectories": {
                "prompts": {"zoo": {"kinds": {"mixed": 16}, "held_out": False}},
                "number": 16,
                "num_steps": [_STEPS],
                "guidance": 3.0,
            },
            "recording": {"batch_size": 8, "folder": folder},
            "training": {
                "num_steps": num_steps,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "trackers": [],
                "device": "cpu",
            },
        }
    )


def recording(recipe: DistillRecipe, folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Return seconds of batches that are drawn, and of batches that are recorded and written."""
    pipeline = Teacher.of(recipe).load(torch.device("cpu"))
    (each,) = passes_of(recipe)
    assert isinstance(each, Trajectories)
    texts = [prompt for prompt in each.prompts[:8]]
    seconds: dict[str, list[float]] = {"drawn": [], "recorded": []}
    for number in range(num_rounds + 1):
        began = time.perf_counter()
        draw(pipeline, texts, range(8), 0, _STEPS, recipe.sampling, "latent")
        between = time.perf_counter()
        each.record(pipeline, 0, None).write(folder / "shard.safetensors", torch.float32)
        if number:  # the first round allocates
            seconds["drawn"].append(between - began)
            seconds["recorded"].append(time.perf_counter() - between)
    return seconds


def steps(recipe: DistillRecipe, folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Return seconds of plain training steps, and of a student's steps."""
    teacher, passes, engine = Teacher.of(recipe), passes_of(recipe), Engine("cpu")
    list(record_predictions(teacher, passes, folder, engine))
    rows = read_rows(passes[0], folder, recipe.recording.batch_size)
    pipeline, hashes = load_student(teacher, recipe.student)
    student = Student(pipeline, recipe.student, hashes, 0, engine.device)
    texts = TextCache(folder / "texts", pipeline, rows.captions())
    list(texts.build())
    examples = RecordedExamples(
        [Source(rows, np.arange(len(rows)))],
        texts,
        caption_dropout=recipe.caption_dropout,
        seed=0,
        device=engine.device,
    )
    trainer = Trainer(pipeline, student, recipe.training, engine)
    other, _ = load_student(teacher, recipe.student)
    plain = _plain(other, next(examples.batches([range(32)])), recipe)
    seconds: dict[str, list[float]] = {"plain": [], "student": []}
    for number, step in enumerate(trainer.steps(examples)):
        began = time.perf_counter()
        plain()
        if number:
            seconds["plain"].append(time.perf_counter() - began)
            seconds["student"].append(step.seconds)
        if number == num_rounds:
            break
    return seconds


def _plain(pipeline: Any, batch: Any, recipe: DistillRecipe) -> Any:
    """Return a function that computes one step of a plain loop on the same batch."""
    denoiser = denoiser_of(pipeline)
    denoiser.requires_grad_(True)
    denoiser.train()
    parameters = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.training.learning_rate)
    predict = conditioning_of(pipeline).predict

    def step() -> None:
        predicted = predict(pipeline, denoiser, batch.noisy, batch.timestep, batch.conditions)
        torch.nn.functional.mse_loss(predicted, batch.target).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Print both ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_of(folder, arguments.rounds + 1)
        for measure, one, other in (
            (recording, "recorded", "drawn"),
            (steps, "student", "plain"),
        ):
            seconds = measure(recipe, folder, arguments.rounds)
            row = {"what": f"{one} / {other}", "num_rounds": len(seconds[one])}
            row |= {"ratio": ratio(seconds, one, other).as_json()}
            row |= {f"seconds_{name}": float(np.median(seconds[name])) for name in (one, other)}
            rows.append(row)
    print(json.dumps(rows, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
