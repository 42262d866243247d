"""LoRAtorio against its formula written out, and in a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cosine_similarity

from afa.aggregators import Condition
from afa.aggregators.fusion import LoRAtorio, NearestToBase
from afa.denoisers.kinds import denoiser_of
from afa.distilling.recipe import DistillRecipe
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.recipe import EvaluateRecipe
from afa.evaluation.work import draw


def condition(rows: int, size: int, *, is_guided: bool = True) -> Condition:
    latent = torch.randn(rows // 2, 4, size, size)
    sample = latent.repeat(2, 1, 1, 1) if is_guided else torch.randn(rows, 4, size, size)
    empty = torch.zeros(rows, 3)
    return Condition(torch.full((rows,), 500.0), empty, torch.zeros(rows, 5, 6), sample)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (6, 1), (7, 3)])
def test_weights_are_the_softmax_of_cosine_distances_by_patch(size: int, patch: int) -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 4, size, size) for _ in range(3)]
    asked = condition(2, size, is_guided=False)
    fused = LoRAtorio(0.2, patch)(features, asked)
    assert fused.weights is not None
    assert fused.weights.shape == (2, 3, size, size)
    assert (fused.weights[:, 2] == 0).all(), "the base has no weight"
    for row, top, left in ((0, 0, 0), (1, patch, 0), (0, size - 1, size - 1)):
        top, left = top // patch * patch, left // patch * patch
        window = (row, slice(None), slice(top, top + patch), slice(left, left + patch))
        base = features[2][window].flatten()
        distances = [1 - cosine_similarity(f[window].flatten(), base, dim=0) for f in features[:2]]
        expected = (torch.stack(distances) / 0.2).softmax(0)
        torch.testing.assert_close(fused.weights[row, :2, top, left], expected)
    whole = sum(f * w for f, w in zip(features, fused.weights.split(1, dim=1), strict=True))
    torch.testing.assert_close(fused.feature, whole)


def test_the_base_predicts_without_prompt() -> None:
    features = [torch.randn(4, 4, 8, 8) for _ in range(3)]
    asked = condition(4, 8)
    fused = LoRAtorio()(features, asked)
    assert torch.equal(fused.feature[:2], features[2][:2])
    others = LoRAtorio(null="experts")(features, asked)
    assert fused.weights is not None
    assert others.weights is not None
    assert torch.equal(fused.weights[2:], others.weights[2:])
    assert (others.weights[:2, 2] == 0).all()


def test_the_nearest_expert_has_the_largest_weight() -> None:
    torch.manual_seed(0)
    base, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    features = [base + 2 * noise, base + 0.1 * noise, base]
    asked = condition(2, 8, is_guided=False)
    near, far = NearestToBase(0.1, 8)(features, asked), LoRAtorio(0.1, 8)(features, asked)
    assert near.weights is not None
    assert far.weights is not None
    assert (near.weights[:, 1] > 0.9).all()
    assert (far.weights[:, 0] > 0.9).all()
    torch.testing.assert_close(
        near.weights[:, 0] * far.weights[:, 0], near.weights[:, 1] * far.weights[:, 1]
    )


def recipe_of(experts: list[Path], base: str | None, rule: str = "loratorio") -> EvaluateRecipe:
    rules: list[dict[str, Any]] = [{"rule": rule}, {"rule": "feature_mean"}]
    return EvaluateRecipe.model_validate(
        {
            "experts": [str(expert) for expert in experts[:2]],
            "base": base,
            "prompts": {"text": "prompts.txt"},
            "methods": [{"name": rule["rule"], "fusion": rule} for rule in [*rules]],
            "sampling": {"num_steps": 2, "guidance": 3, "height": 16, "width": 16},
            "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
        }
    )


@pytest.mark.parametrize("rule", ["loratorio", "nearest"])
def test_it_needs_the_base_of_the_comparison(experts: list[Path], rule: str) -> None:
    with pytest.raises(ValidationError, match=f"must have a base for the method '{rule}'"):
        recipe_of(experts, None, rule)
    recipe = recipe_of(experts, str(experts[2]), rule)
    builder = MethodBuilder(recipe, recipe.sampling, torch.device("cpu"))
    counts = []
    for method in (*recipe.methods, recipe.methods[0]):
        pipeline = builder.build(method)
        counts.append(len(denoiser_of(pipeline).experts))
        assert draw(pipeline, ["a fox"], [0], 0, 2, recipe.sampling)[0].size == (16, 16)
    assert counts == [3, 2, 3]
    found = Identities(recipe).method(recipe.methods[0], 0)
    other = Identities(recipe_of(experts, str(experts[0]), rule)).method(recipe.methods[0], 0)
    assert found != other


@pytest.mark.parametrize("rule", ["loratorio", "nearest"])
def test_a_teacher_needs_both_halves_in_one_batch(experts: list[Path], rule: str) -> None:
    """Pictures are recorded with and without prompt in calls of their own."""
    given: dict[str, Any] = {
        "teacher": {"fusion": {"rule": rule}},
        "experts": [str(expert) for expert in experts[:2]],
        "base": str(experts[2]),
        "student": {"init": "merge"},
        "training": {"num_steps": 1},
        "pictures": {"data": {"scenes": {"num_samples": 2}}, "number": 2},
    }
    with pytest.raises(ValidationError, match="both halves of guidance"):
        DistillRecipe.model_validate(given)
    given["teacher"] = {"fusion": {"rule": rule, "null": "experts"}}
    DistillRecipe.model_validate(given)
