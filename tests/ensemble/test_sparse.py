"""Sparse fusion: the leading experts at each pixel, or by step, where the others do not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import afa
from afa.aggregators import Condition, Mean, Only, Separate
from afa.aggregators.sparse import Leading
from afa.denoisers.kinds import denoiser_of
from afa.ensemble.recording import record_weights
from afa.ensemble.sparse import LeadingExperts, run_leading
from afa.evaluation.cost import measure
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.prompts import Prompt
from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe
from afa.evaluation.shares import read_shares, record_shares
from afa.evaluation.work import Store, draw
from afa.loading.pipeline import with_rules
from tests.refusal import refusal
from tests.training.runs import SMALL

FEATURES = [torch.full((1, 2, 1, 3), float(10**n)) for n in range(3)]
BIAS = torch.tensor([[[0.0, 5.0, 1.0]], [[1.0, 0.0, 5.0]], [[5.0, 1.0, 0.0]]])[None]


def condition() -> Condition:
    empty = torch.zeros(1, 1)
    return Condition(torch.zeros(1), empty, None, torch.zeros(1, 4, 1, 3), bias=BIAS, num_experts=3)


def test_the_largest_weights_of_a_pixel_are_kept_and_sum_to_one() -> None:
    whole = Mean()(FEATURES, condition()).weights
    assert whole is not None
    first = Leading(Mean(), 1)(FEATURES, condition())
    assert first.weights is not None
    assert first.weights[0].argmax(0).tolist() == [[2, 0, 1]]
    assert first.weights.sum(1).tolist() == [[[1, 1, 1]]]
    assert first.feature[0, 0].tolist() == [[100, 1, 10]]
    both = Leading(Mean(), 2)(FEATURES, condition()).weights
    assert both is not None
    assert ((both > 0).sum(1) == 2).all()
    kept = torch.where(both > 0, whole, 0)
    torch.testing.assert_close(both, kept / kept.sum(1, keepdim=True))
    every = Leading(Mean(), 3)(FEATURES, condition()).weights
    assert torch.equal(every, whole)


def test_some_experts_and_rules_without_weights() -> None:
    given = {0: FEATURES[0], 2: FEATURES[2]}
    some = Leading(Mean(), 1).fuse_some(given, condition())
    assert some.weights is not None
    assert some.weights[0].argmax(0).tolist() == [[2, 0, 0]]
    assert (some.weights[:, 1] == 0).all()
    apart = Leading(Separate(), 1)(FEATURES, condition())
    assert apart.weights is None
    assert len(apart.feature) == 3
    assert Leading(Mean(), 1).can_steer
    assert not Leading(Only(0), 1).can_steer
    with refusal("AFA-FUSION-017", "0"):
        Leading(Mean(), 0)


def test_the_leading_experts_of_the_last_whole_step_run() -> None:
    schedule = LeadingExperts(3, count=2, every=3)

    def see(*shares: float) -> None:
        weights = torch.tensor(shares)[None, :, None, None].expand(2, 3, 4, 4)
        schedule.observe(torch.zeros(2), "site", weights)

    assert schedule(900) == [0, 1, 2]
    see(0.5, 0.1, 0.4)
    see(0.1, 0.2, 0.7)
    assert schedule(900) == [0, 1, 2], "a call for the other half of guidance"
    see(0.6, 0.3, 0.1)
    assert schedule(800) == [0, 2]
    see(0.0, 0.0, 1.0)
    assert schedule(700) == [0, 2]
    assert schedule(600) == [0, 1, 2]
    see(0.0, 0.6, 0.4)
    assert schedule(500) == [1, 2]
    assert schedule(900) == [0, 1, 2], "another picture"


@pytest.fixture
def folder(experts: list[Path], tmp_path: Path) -> Path:
    pipeline = afa.load_pipeline(experts, SMALL)
    with torch.no_grad():
        for rule in denoiser_of(pipeline).aggregators:
            for parameter in rule.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return afa.save_ensemble(pipeline, tmp_path / "ensemble")


def recipe_of(experts: list[Path], folder: Path, *sparse: Any) -> EvaluateRecipe:
    methods = [
        {"name": f"m{n}", "ensemble": str(folder), "sparse": each} for n, each in enumerate(sparse)
    ]
    return EvaluateRecipe.model_validate(
        {
            "experts": [str(expert) for expert in experts],
            "prompts": {"text": "prompts.txt"},
            "methods": methods,
            "sampling": {"num_steps": 6, "guidance": 3, "height": 16, "width": 16},
            "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
        }
    )


def test_sparse_methods_of_a_comparison(experts: list[Path], folder: Path) -> None:
    asked = [None, {"experts": 1}, {"experts": 2}, {"experts": 1, "by": "step", "every": 3}]
    recipe = recipe_of(experts, folder, *asked)
    builder = MethodBuilder(recipe, recipe.sampling, torch.device("cpu"))
    drawn, calls = [], []
    for method in recipe.methods:
        pipeline = builder.build(method)
        with measure(pipeline) as cost:
            pictures = draw(pipeline, ["a fox"], [0], 0, 6, recipe.sampling)
        drawn.append(pictures[0].tobytes())
        calls.append(cost.expert_calls)
        again = draw(pipeline, ["a fox"], [0], 0, 6, recipe.sampling)
        assert again[0].tobytes() == drawn[-1]
    assert len(set(drawn)) == 4
    whole = 6 * 3 * 2
    assert calls == [whole, whole, whole, 2 * (2 * 3 + 4 * 1)]
    identities = [Identities(recipe).method(method, 0) for method in recipe.methods]
    assert len({str(each) for each in identities}) == 4


def test_the_experts_that_run_are_chosen_for_each_picture(
    experts: list[Path], folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(experts, folder, {"experts": 1, "by": "step", "every": 3})
    builder = MethodBuilder(recipe, recipe.sampling, torch.device("cpu"))
    pipeline = builder.build(recipe.methods[0])
    texts = ["a fox", "a car", "bread"]
    together = draw(pipeline, texts, range(3), 0, 6, recipe.sampling)
    for n, text in enumerate(texts):
        alone = draw(pipeline, [text], [n], 0, 6, recipe.sampling)
        assert together[n].tobytes() == alone[0].tobytes()

    store = Store(tmp_path)
    prompts = [Prompt(text, "mixed", None) for text in texts]
    record_shares(recipe, prompts, builder, store)
    shares = read_shares(store, recipe)
    assert shares is not None
    found = shares["groups"]["mixed"]["shares"]
    assert len(found) == 6, "steps"
    alone = []
    for n, text in enumerate(texts):
        with record_weights(denoiser_of(pipeline)) as record:
            draw(pipeline, [text], [n], 0, 6, recipe.sampling, output_type="latent")
        alone.append(record.steps[1].weights["conv_out"][-1].mean((1, 2)))
    assert found[1]["conv_out"] == pytest.approx(torch.stack(alone).mean(0).tolist(), abs=1e-6)


def test_what_sparse_methods_cannot_have(experts: list[Path], folder: Path) -> None:
    with pytest.raises(ValidationError, match="sparse"):
        MethodRecipe.model_validate({"name": "a", "model": "x", "sparse": {"experts": 1}})
    drafts = {"judge": "zoo:base"}
    with pytest.raises(ValidationError, match="sparse"):
        MethodRecipe.model_validate(
            {"name": "a", "ensemble": "x", "sparse": {"experts": 1}, "drafts": drafts}
        )
    ensemble = denoiser_of(afa.load_ensemble(folder))
    for count, every in ((0, 5), (4, 5), (1, 1)):
        with refusal("AFA-ENSEMBLE-063", "from 1 to 3"):
            run_leading(ensemble, count, every)
    rigid = denoiser_of(with_rules(afa.load_ensemble(folder), [_Rigid()] * len(ensemble.sites)))
    with refusal("AFA-ENSEMBLE-019", "_Rigid"):
        run_leading(rigid, 1, 5)


@pytest.mark.parametrize("by", ["pixel", "step"])
def test_nothing_to_leave_out_is_refused(by: str, experts: list[Path], folder: Path) -> None:
    mean = afa.save_ensemble(afa.load_pipeline(experts), folder.with_name("mean"))
    for place, count in ((folder, 3), (mean, 1)):
        recipe = recipe_of(experts, place, {"experts": count, "by": by})
        builder = MethodBuilder(recipe, recipe.sampling, torch.device("cpu"))
        with refusal("AFA-EVAL-034", str(count)):
            builder.build(recipe.methods[0])


def test_half_precision_is_that_of_the_rule(experts: list[Path], folder: Path) -> None:
    """With all experts, top-k is the ensemble, bit for bit, in bfloat16 as well."""
    whole = afa.load_ensemble(folder, torch_dtype=torch.bfloat16)
    rules = [Leading(rule, 3) for rule in denoiser_of(whole).aggregators]
    every = with_rules(whole, rules)
    sample = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    text = torch.randn(2, 5, denoiser_of(whole).config.cross_attention_dim * 3).bfloat16()
    with torch.no_grad():
        one, other = (denoiser_of(each)(sample, 500, text).sample for each in (whole, every))
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, other)


class _Rigid(torch.nn.Module):
    takes_some = False
