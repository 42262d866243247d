"""Weighted prompts in comparisons: batches, metrics, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afa.evaluation import evaluate, load_evaluate_recipe
from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.scoring import Scoring
from afa.evaluation.work import draw
from afa.loading.pipeline import load_single
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts

pytestmark = pytest.mark.slow

CAPTIONS = [
    "a (fox:1.3) on the left and a [pizza] on the right, blue background",
    "a fox on the left and a pizza on the right, (red background:1.4)",
]
WORDS = [
    "a fox on the left and a pizza on the right, blue background",
    "a fox on the left and a pizza on the right, red background",
]
METHODS = [{"name": "animals", "model": "zoo:animals"}, {"name": "AFA", "ensemble": "zoo:ensemble"}]


def recipe_of(write: Callable[..., Path], **sampling: Any) -> Any:
    folder = write().parent
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    path = write(
        prompts={"text": "prompts.txt"},
        methods=METHODS,
        metrics=["scenes", {"name": "clip_t", "weights": "zoo:clip"}],
        curve=None,
        sampling={"num_steps": 1, "guidance": 3, "num_threads": 1, **sampling},
    )
    return load_evaluate_recipe(path)


def test_metrics_read_the_words(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = Scoring.score

    def score(self: Scoring, unit: Any) -> None:
        seen.extend(self._texts)
        original(self, unit)

    monkeypatch.setattr(Scoring, "score", score)
    recipe, output = recipe_of(write, prompt_syntax="weighted"), tmp_path / "new"
    list(evaluate(recipe, output))
    assert set(seen) == set(WORDS)
    found = json.loads((output / "report.json").read_text())
    assert {"both", "clip_t"} <= set(found["rows"][0]["groups"]["all"]["scores"])
    claimed = json.loads((output / "methods" / "afa" / "replica-0" / "method.json").read_text())
    assert claimed["sampling"]["prompt_syntax"] == "weighted"
    with refusal("AFA-EVAL-031", r"\(\w+( \w+)?:1"):  # brackets are no scene
        list(evaluate(recipe_of(write), tmp_path / "plain"))


def test_a_recipe_that_cannot_be_drawn_is_not_recorded(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    refused = recipe_of(write, prompt_syntax="weighted", negative_prompt="(red")
    with refusal("AFA-DRAW-036"):
        list(evaluate(refused, tmp_path / "new"))
    list(evaluate(recipe_of(write, prompt_syntax="weighted"), tmp_path / "new"))


def test_plain_recipes_are_recorded_as_before() -> None:
    assert "prompt_syntax" not in SamplingRecipe().model_dump()
    assert SamplingRecipe(prompt_syntax="weighted").model_dump()["prompt_syntax"] == "weighted"


def test_other_families_are_refused_before_the_recipe_is_recorded(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved_experts("pixart", tmp_path / "models", 1)[0]
    path = write(
        methods=[*METHODS, {"name": "PixArt", "model": str(folder)}],
        metrics=["scenes"],
        sampling={"num_steps": 1, "prompt_syntax": "weighted"},
    )
    with refusal("AFA-ENSEMBLE-074", "PixArt"):
        list(evaluate(load_evaluate_recipe(path), tmp_path / "new"))
    assert not (tmp_path / "new" / "prompts.json").exists()


def test_a_picture_does_not_depend_on_longer_prompts_of_its_batch(experts: list[Path]) -> None:
    pipeline = load_single(str(experts[0]))[0]
    pipeline.set_progress_bar_config(disable=True)
    sampling = SamplingRecipe(
        num_steps=2, guidance=3.0, height=16, width=16, prompt_syntax="weighted"
    )
    prompts = ["a (fox:1.3)", "a fox BREAK (a pizza:1.2)", "a [bee] " * 20]
    together = draw(pipeline, prompts, range(3), 0, 2, sampling, "latent")
    for n, prompt in enumerate(prompts):
        (alone,) = draw(pipeline, [prompt], [n], 0, 2, sampling, "latent")
        torch.testing.assert_close(together[n], alone, rtol=1e-4, atol=1e-5)
