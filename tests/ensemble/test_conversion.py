"""Experts that predict different quantities in one ensemble: pictures, training, files, refusals.

`tests/pairs` tries them beside everything that can be switched on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    StableDiffusionPipeline,
)

import afa
from afa.aggregators import SABW
from afa.aggregators.fusion.shell import ShellRecipe
from afa.drawing.contenders import MERGE, Contenders
from afa.drawing.merged import merged_pipeline
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.evaluation.planned import plan_of_evaluation
from afa.evaluation.recipe import EvaluateRecipe
from afa.loading.pipeline import load_single, with_rules
from afa.merging import WeightedSum
from afa.preflight.run import look
from afa.training.planned import plan_of_training
from tests.preflight.test_preflight import changed
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts
from tests.training.runs import SMALL, recipe, steps_of

if TYPE_CHECKING:
    from pathlib import Path

FILE = "scheduler/scheduler_config.json"
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def mixed(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that predicts noise, one velocity, and one velocity with zero terminal SNR."""
    root = tmp_path_factory.mktemp("mixed")
    velocity = changed(experts[1], root / "velocity", FILE, prediction_type="v_prediction")
    return [experts[0], velocity, changed(experts[2], root / "zero", FILE, **ZERO_SNR)]


def picture(pipeline: Any, **call: Any) -> Any:
    """The latent, since autoencoders differ."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent", **call}
    return pipeline("a fox", generator=generator, **call).images[0].numpy()


def kinds_in(pipeline: Any) -> list[str]:
    ensemble: EnsembleDenoiser = pipeline.unet
    assert ensemble.objectives is not None
    return [each.predicts for each in ensemble.objectives.experts]


def test_an_expert_alone_draws_as_by_itself(mixed: list[Path]) -> None:
    """DDIM makes the same step of noise and of the velocity that it is converted from."""
    pipeline = afa.load_pipeline(mixed[:2], SMALL)
    right = picture(load_single(str(mixed[1]))[0])
    assert np.abs(right - picture(load_single(str(mixed[0]))[0])).max() > 1e-2
    only = with_rules(pipeline, ShellRecipe(expert=1).rules(pipeline.unet.sites))
    assert kinds_in(only) == ["epsilon", "v_prediction"]
    np.testing.assert_allclose(picture(only), right, atol=2e-4)
    contenders = Contenders(pipeline)
    assert MERGE not in contenders.names
    for speed in ("exact", "fast"):
        alone = contenders.pipeline(contenders.names[1], speed)
        if speed == "exact":
            np.testing.assert_allclose(picture(alone), right, atol=2e-4)
        assert np.isfinite(picture(alone)).all()
    first = contenders.pipeline(contenders.names[0])
    assert first.unet is pipeline.unet.experts[0]


def test_the_order_decides_what_the_ensemble_predicts(mixed: list[Path]) -> None:
    """Equal predictions of noise and of velocity are one picture, whichever scheduler draws it."""
    pictures = []
    for order in ((0, 1), (1, 0)):
        pipeline = afa.load_pipeline([mixed[n] for n in order])
        rules = ShellRecipe(expert=order.index(1)).rules(pipeline.unet.sites)
        pictures.append(picture(with_rules(pipeline, rules)))
    one, other = pictures
    np.testing.assert_allclose(one, other, atol=2e-4)


def test_pure_noise_is_finite_for_all(mixed: list[Path]) -> None:
    pipeline = afa.load_pipeline([mixed[2], mixed[0], mixed[1]])
    assert kinds_in(pipeline) == ["v_prediction", "epsilon", "v_prediction"]
    assert np.isfinite(picture(pipeline)).all()
    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps[0] == 999


def test_equal_objectives_are_left_alone(experts: list[Path], mixed: list[Path]) -> None:
    assert afa.load_pipeline(experts).unet.conversion is None
    assert afa.load_pipeline([mixed[1]]).unet.conversion is None


def test_trained_saved_and_loaded(mixed: list[Path], tmp_path: Path) -> None:
    steps = list(steps_of(recipe(mixed, num_steps=3), tmp_path / "run"))
    assert all(np.isfinite(step.loss) for step in steps)
    again = afa.load_ensemble(tmp_path / "run")
    assert kinds_in(again) == ["epsilon", "v_prediction", "v_prediction"]
    assert len(set(again.unet.objectives.experts)) == 3
    before = [load_single(str(expert))[0].unet.state_dict() for expert in mixed]
    for expert, own in zip(again.unet.experts, before, strict=True):
        assert all(torch.equal(tensor, own[name]) for name, tensor in expert.state_dict().items())
    assert any(rule.conv_out.weight.abs().max() > 0 for rule in again.unet.aggregators)


def test_predictions_alone_are_fused_by_default_if_the_first_begins_with_noise(
    mixed: list[Path], tmp_path: Path
) -> None:
    """docs/checkpoints.md, How well experts of several kinds combine."""
    zero_first = [mixed[2], mixed[0]]

    def sites(experts: list[Path], **options: Any) -> int:
        pipeline = afa.load_pipeline(experts, SMALL, **options)
        return sum(isinstance(rule, SABW) for rule in pipeline.unet.aggregators)

    every = sites(mixed[:2])
    assert every > 1
    assert sites(zero_first) == 1
    assert sites(zero_first, fuse="blocks") == every
    assert sites(zero_first[::-1]) == every, "noise first"
    assert sites([mixed[2], mixed[2]], allow_duplicates=True) == every, "nothing is converted"

    asked = recipe(zero_first, num_steps=1)
    list(steps_of(asked, tmp_path / "run"))
    trained = afa.load_ensemble(tmp_path / "run")
    assert trained.unet.aggregators[-1].config.sites == "conv_out"
    found = look(plan_of_training(asked), with_weights=False)
    (note,) = [each for each in found.findings if each.code == "AFA-LOAD-105"]
    assert (note.level, note.remedy) == ("note", "")
    assert "fuse = blocks" in note.means
    explicit = asked.model_copy(update={"fuse": "blocks"})
    other = look(plan_of_training(explicit), with_weights=False)
    (note,) = [each for each in other.findings if each.code == "AFA-LOAD-105"]
    assert "fuse = blocks" not in note.means
    sizes = [each.estimates["training"].takes for each in (found, other)]
    assert sizes[0] < sizes[1], "the memory of what is trained"
    reversed_order = look(plan_of_training(recipe(zero_first[::-1])), with_weights=False)
    (warning,) = [each for each in reversed_order.findings if each.code == "AFA-LOAD-105"]
    assert (warning.level, warning.remedy) == ("warning", "List 'zero' first.")
    plain = recipe(mixed[:2], num_steps=1)
    assert "fuse" not in plain.model_dump(), "runs of earlier releases are still equal"


def test_other_pipelines_take_it(mixed: list[Path]) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = afa.load_pipeline(mixed)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    given = torch.rand(1, 3, 16, 16)
    assert other("a fox", image=given, num_inference_steps=4).images


def test_weights_of_different_objectives_are_not_merged(mixed: list[Path], tmp_path: Path) -> None:
    with refusal("AFA-DRAW-018", "Compare them without merges"):
        merged_pipeline(afa.load_pipeline(mixed), WeightedSum(None))
    asked = {
        "experts": [str(each) for each in mixed],
        "prompts": {"zoo": {"kinds": {"mixed": 1}}},
        "methods": [{"name": "mean", "fusion": {"rule": "noise_mean"}}],
        "metrics": ["scenes"],
        "sampling": {"device": "cpu"},
    }
    merge = {"name": "merge", "merge": {"method": "weighted"}}

    def found(*methods: dict[str, Any]) -> dict[str, str]:
        given = {**asked, "methods": [*asked["methods"], *methods]}
        plan = plan_of_evaluation(EvaluateRecipe.model_validate(given))
        return {f.code: f.level for f in look(plan, with_weights=False).findings}

    assert found()["AFA-LOAD-105"] == "note"
    assert found(merge)["AFA-LOAD-010"] == "error"


def test_what_cannot_be_converted_is_refused(
    experts: list[Path], mixed: list[Path], tmp_path: Path
) -> None:
    unknown = changed(experts[1], tmp_path / "unknown", FILE, prediction_type="logits")
    with refusal("AFA-LOAD-010", "logits"):
        afa.load_pipeline([experts[0], unknown])
    own_levels = changed(
        experts[1], tmp_path / "own", FILE, beta_schedule=None, _class_name="IPNDM"
    )
    IPNDMScheduler().save_pretrained(own_levels / "scheduler")
    index = own_levels / "model_index.json"
    index.write_text(re.sub(r'"\w+Scheduler"', '"IPNDMScheduler"', index.read_text()))
    with refusal("AFA-LOAD-010", "beta"):
        afa.load_pipeline([experts[0], own_levels])
    (flux,) = saved_experts("flux", tmp_path, count=1)
    shift = changed(flux, tmp_path / "flux", FILE, num_train_timesteps=500)
    with refusal("AFA-LOAD-010", "500"):
        afa.load_pipeline([flux, shift])
    flow = changed(experts[1], tmp_path / "flow", FILE)
    FlowMatchEulerDiscreteScheduler().save_pretrained(flow / "scheduler")
    index = flow / "model_index.json"
    flow_matching = '"FlowMatchEulerDiscreteScheduler"'
    index.write_text(re.sub(r'"\w+Scheduler"', flow_matching, index.read_text()))
    pipeline = afa.load_pipeline([experts[0], flow])
    assert kinds_in(pipeline) == ["epsilon", "flow_prediction"]
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert np.isfinite(picture(pipeline)).all()
