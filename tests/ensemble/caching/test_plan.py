"""Pruning: who is left out, and what that must equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.aggregators import SABW, Condition, weighted_sum
from afa.aggregators.fusion.magic_fusion import MagicFusion
from afa.aggregators.simple import Only
from afa.ensemble.caching.plan import PruningPlan, Shares, StepRange, load_plan, save_plan
from afa.ensemble.calibrate import calibrate
from tests.aggregators.test_sabw import CONFIG, example, trained
from tests.ensemble.caching.test_loop import FAMILIES, arguments_of, at, ensemble_of
from tests.refusal import refusal
from tests.tiny_transformers import call, inputs_of


def plan_of(ensemble: Any, *ranges: dict[str, list[int]], above: float = 500) -> PruningPlan:
    """Ranges meet at timestep 500."""
    edges = [above, None][-len(ranges) :]
    return PruningPlan(
        num_experts=len(ensemble.experts),
        sites=[site.name for site in ensemble.sites],
        keep=0.9,
        ranges=[StepRange(above=e, experts=r) for e, r in zip(edges, ranges, strict=True)],
    )


def run(ensemble: Any, arguments: dict[str, Any], step: int = 700) -> torch.Tensor:
    with torch.no_grad():
        return call(ensemble, at(arguments, step))


def test_a_single_expert_that_is_left_is_not_asked_about() -> None:
    features, condition = example()
    sabw = trained()
    sabw.fusion_weights = None  # type: ignore[method-assign,assignment]
    fused, weights = sabw.fuse_some({1: features[1]}, condition)
    assert fused is features[1]
    assert weights is not None
    assert torch.equal(weights[:, 1], torch.ones_like(weights[:, 1]))
    assert weights.sum() == weights[:, 1].sum()


@pytest.mark.parametrize("settings", [{}, {"spatial": False}, {"pool": 2}, {"pool": 4}], ids=str)
def test_who_is_missing_has_no_weight_and_looks_like_the_mean(settings: dict[str, Any]) -> None:
    features, condition = example()
    sabw = SABW(replace(CONFIG, **settings))
    torch.nn.init.normal_(sabw.conv_out.weight)
    fused, weights = sabw.fuse_some({0: features[0], 2: features[2]}, condition)
    completed = [features[0], (features[0] + features[2]) / 2, features[2]]
    whole = sabw.fusion_weights(completed, condition)
    assert weights is not None
    assert not weights[:, 1].any()
    expected = whole[:, [0, 2]] / whole[:, [0, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(weights[:, [0, 2]], expected)
    torch.testing.assert_close(fused, weighted_sum([features[0], features[2]], expected))


def test_all_of_them_are_the_whole_rule() -> None:
    features, condition = example()
    sabw = trained()
    expected = sabw(features, condition)
    came = sabw.fuse_some(dict(enumerate(features)), condition)
    torch.testing.assert_close(came.feature, expected.feature)
    torch.testing.assert_close(came.weights, expected.weights)


def test_other_rules_need_all() -> None:
    features, condition = example()
    with refusal("AFA-FUSION-008"):
        MagicFusion().fuse_some({0: features[0]}, condition)
    assert Only(0).fuse_some({0: features[0]}, condition).feature is features[0]
    with refusal("AFA-FUSION-016", r"Only\(0\)", r"\[1\]"):
        Only(0).fuse_some({1: features[1]}, condition)


def test_a_plan_follows_the_aggregators_that_it_was_made_with() -> None:
    ensemble, other = ensemble_of("unet"), ensemble_of("unet")
    shares = Shares(ensemble, 2, 1000)
    ensemble.on_weights = shares.note
    run(ensemble, arguments_of("unet"))
    plan = shares.plan(0.5)
    other.plan = plan  # equal weights
    with torch.no_grad():
        other.aggregators[0].conv_out.weight.add_(1)
    with refusal("AFA-ENSEMBLE-006"):
        other.plan = plan
    other.plan = plan.model_copy(update={"aggregators": None})  # of an earlier release


def test_streams_of_one_block_are_left_to_the_same_experts() -> None:
    ensemble = ensemble_of("flux")
    with refusal("AFA-ENSEMBLE-008", "'double.0.text'", "'double.0'"):
        ensemble.plan = plan_of(ensemble, {"double.0": [0]})
    ensemble.plan = plan_of(ensemble, {"double.0": [0], "double.0.text": [0]})


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_do_not_run_where_they_are_left_out(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    calls = [0, 0]
    for n, expert in enumerate(ensemble.experts):
        layers = ensemble.family.layers(expert)

        def count(*_: Any, n: int = n) -> None:
            calls[n] += 1

        layers[len(layers) // 2].register_forward_hook(count)
    names = [site.name for site in ensemble.sites]
    above = 0.5 if family.startswith(("flux", "klein", "chroma", "qwen")) else 500
    ensemble.plan = plan_of(ensemble, {name: [1] for name in names[1:]}, {}, above=above)
    early = run(ensemble, arguments)
    assert calls == [0, 1]
    late = run(ensemble, arguments, step=300)
    assert calls == [1, 2]
    ensemble.plan = None
    assert torch.equal(late, run(ensemble, arguments, step=300))
    assert not torch.equal(early, run(ensemble, arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_alone_everywhere_an_expert_is_itself(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    names = [site.name for site in ensemble.sites]
    ensemble.plan = plan_of(ensemble, {name: [1] for name in names})
    came = run(ensemble, arguments)
    now = inputs_of(at(arguments, 700), 1, 2)
    if "added_cond_kwargs" in now and "text_embeds" in now["added_cond_kwargs"]:
        added = now["added_cond_kwargs"]
        now["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].chunk(2, -1)[1]}
    with torch.no_grad():
        expected = call(ensemble.experts[1], now)
    torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5)


def test_it_goes_together_with_caching_and_with_a_record() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.plan = plan_of(ensemble, {"mid": [0], "up.0.0": [1]})
    ensemble.acceleration = afa.Acceleration(interval=2)
    with afa.record_weights(ensemble) as record:
        for step in (900, 700, 500):
            run(ensemble, arguments, step)
    shares = record.mean_share()
    assert shares.shape == (3, len(ensemble.sites), 2)
    place = [site.name for site in ensemble.sites].index("mid")
    assert shares[:, place].tolist() == [[1, 0]] * 3


def test_the_fewest_experts_that_are_listened_to() -> None:
    ensemble = ensemble_of("unet", num_experts=3)
    names = [site.name for site in ensemble.sites]
    seen = Shares(ensemble, num_ranges=2, highest=1000)

    def note(step: float, site: str, *shares: float) -> None:
        weights = torch.tensor(shares).view(1, 3, 1, 1).expand(2, 3, 4, 4)
        seen.note(torch.tensor([step, step]), site, weights)

    for name in names:
        note(999, name, 0.5, 0.25, 0.25)
        note(501, name, 0.5, 0.25, 0.25)
        note(500, name, 0.9, 0.02, 0.08)
        note(1, name, 0.7, 0.0, 0.3)
    plan = seen.plan(0.98)
    assert [part.above for part in plan.ranges] == [500, None]
    assert plan.ranges[0].experts == {}
    assert plan.ranges[1].experts == {name: [0, 2] for name in names}
    assert plan.share_left == pytest.approx(1 - 1 / 6)
    assert seen.plan(0.7).ranges[1].experts["mid"] == [0]
    assert seen.plan(1.0).ranges[0].experts == {}
    assert plan.at(500) == plan.ranges[1].experts
    assert plan.at(500.5) == {}
    with refusal("AFA-ENSEMBLE-009", "0", "1"):
        seen.plan(0)


def test_a_text_s_site_goes_with_its_block() -> None:
    ensemble = ensemble_of("flux", num_experts=3)
    seen = Shares(ensemble, num_ranges=1, highest=1)
    for site in ensemble.sites:
        shares = [1.0, 0, 0] if site.stream == "image" else [0, 1.0, 0]
        seen.note(torch.tensor([0.5]), site.name, torch.tensor(shares).view(1, 3, 1, 1))
    experts = seen.plan(0.98).ranges[0].experts
    assert experts["embed"] == experts["out"] == [0]
    assert experts["double.0"] == experts["double.0.text"] == [0, 1]


def test_nothing_was_drawn() -> None:
    with refusal("AFA-ENSEMBLE-010"):
        Shares(ensemble_of("unet"), 1, 1000).plan(0.9)


def test_a_plan_is_saved_and_of_one_ensemble(tmp_path: Path) -> None:
    ensemble = ensemble_of("unet")
    plan = plan_of(ensemble, {"mid": [0]}, {})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    plan.check(ensemble)
    with refusal("AFA-ENSEMBLE-005", "3", str(len(ensemble.sites))):
        plan.check(ensemble_of("unet", num_experts=3))
    wrong: list[dict[str, list[int]]] = [{"mid": []}, {"mid": [2]}, {"middle": [0]}]
    for experts in wrong:
        with refusal("AFA-ENSEMBLE-007"):
            plan_of(ensemble, experts).check(ensemble)
    (tmp_path / "plan.json").write_text('{"format": "afa-pruning-plan", "sites": 3}')
    with refusal("AFA-ENSEMBLE-011", r"'\w+'"):
        load_plan(tmp_path / "plan.json")


def test_from_pictures_to_pictures(tmp_path: Path) -> None:
    pipeline = afa.load_ensemble("zoo:ensemble")
    pipeline.set_progress_bar_config(disable=True)
    prompts = [
        f"a fox on the left and a pizza on the right, {c} background" for c in ("blue", "red")
    ]
    drawing = calibrate(pipeline, prompts, num_steps=3, num_ranges=3, batch_size=1)
    done = []
    while True:
        try:
            done.append(next(drawing))
        except StopIteration as stop:
            shares = stop.value
            break
    assert done == [1, 2]
    assert pipeline.unet.on_weights is None
    plan = shares.plan(0.6)
    assert plan.share_left < 1
    save_plan(plan, tmp_path / "plan.json")
    settings = {"num_inference_steps": 3, "output_type": "latent"}

    def latents() -> torch.Tensor:
        return pipeline(prompts[0], generator=torch.Generator().manual_seed(0), **settings).images

    whole = latents()
    assert afa.accelerate(pipeline, plan=tmp_path / "plan.json") is pipeline
    assert not torch.equal(latents(), whole)
    afa.accelerate(pipeline, plan=shares.plan(1.0))
    assert torch.equal(latents(), whole)
    afa.accelerate(pipeline)
    assert pipeline.unet.plan is None


def test_rules_are_sabw_s() -> None:
    assert SABW.can_prune
    assert Condition._fields[0] == "timestep"
