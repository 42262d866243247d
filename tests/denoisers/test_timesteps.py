"""Every family's timesteps: what its stock pipeline hands to the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.aggregators import Condition
from afa.aggregators.fusion import HandOver, MagicFusion
from afa.aggregators.fusion.hand_over import HandOverRecipe
from afa.denoisers import FAMILIES
from afa.denoisers.flux import FLUX
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.timesteps import highest_timestep, in_scheduler_timesteps
from afa.denoisers.unet import UNET
from afa.ensemble.calibrate import calibrate
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.recipe import EvaluateRecipe
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES, saved_experts

#: what draws a picture with a pipeline of each family
DRAWS: dict[str, dict[str, Any]] = {
    "unet": {"prompt": "a fox", "height": 16, "width": 16},
    "sd3": {"prompt": "a fox", "height": 16, "width": 16},
    "flux": {"prompt": "a fox", "height": 16, "width": 16},
    "chroma": {"prompt": "a fox", "height": 16, "width": 16},
    "z_image": {"prompt": "a fox", "height": 16, "width": 16},
    "qwen_image": {"prompt": "a fox", "height": 16, "width": 16},
    "flux2": {"prompt": "a fox", "height": 16, "width": 16},
    "pixart": {
        "prompt": "a fox",
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "dit": {"class_labels": [1]},
}


def pipeline_of(family: str, folder: Path) -> Any:
    if family == "unet":
        return tiny_pipeline(folder / "tokenizer")
    return PIPELINES[family.replace("_", "-").replace("flux2", "klein")](folder / "tokenizer")


@pytest.mark.parametrize("family", sorted(DRAWS))
def test_the_divisor_is_what_the_librarys_pipeline_divides_by(family: str, tmp_path: Path) -> None:
    assert set(DRAWS) >= {f.name for f in FAMILIES}, "a new family needs a line there"
    known = next(f for f in FAMILIES if f.name == family)
    pipeline = pipeline_of(family, tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[float] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        interface = known.interface
        bound = interface.signature(known.model_class).bind(*args, **kwargs).arguments
        timestep = interface.arguments(bound)["timestep"]
        seen.append(float(torch.as_tensor(timestep).flatten()[0]))

    denoiser_of(pipeline).register_forward_pre_hook(note, with_kwargs=True)
    pipeline(num_inference_steps=6, **DRAWS[family])
    expected = {float(step) / known.timestep_divisor for step in pipeline.scheduler.timesteps}
    assert sorted(set(seen)) == pytest.approx(sorted(expected))
    highest = highest_timestep(known, pipeline.scheduler.config.num_train_timesteps)
    assert 0.8 * highest < max(seen) <= highest


def asked_of(schedule: Any, timesteps: Sequence[float]) -> list[int]:
    return [schedule(timestep)[0] for timestep in timesteps]


def test_a_schedule_is_asked_about_the_schedulers_timesteps() -> None:
    given = HandOver([2, 0, 1], [700, 300])
    assert in_scheduler_timesteps(given, UNET) is given
    steps = [1000, 701, 700, 699, 300, 299, 0]
    for precision in (torch.float64, torch.float32):
        own = [float(torch.tensor(step, dtype=precision) / 1000) for step in steps]
        assert asked_of(in_scheduler_timesteps(given, FLUX), own) == asked_of(given, steps)
    assert asked_of(given, steps) == [2, 2, 2, 0, 0, 1, 1]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_hand_over_in_a_recipe_uses_every_expert_of_a_flow_model(
    family: str, tmp_path: Path
) -> None:
    rules: list[dict[str, Any]] = [{}, {"order": [2, 1, 0]}, {"boundaries": [900.0, 400.0]}]
    recipe = EvaluateRecipe.model_validate(
        {
            "experts": [str(folder) for folder in saved_experts(family, tmp_path)],
            "prompts": {"zoo": {"kinds": {"mixed": 1}}},
            "methods": [
                {"name": f"h{n}", "fusion": {"rule": "hand_over", **rule}}
                for n, rule in enumerate(rules)
            ],
            "metrics": ["scenes"],
        }
    )
    builder = MethodBuilder(recipe, recipe.sampling, torch.device("cpu"))
    for method, order in zip(recipe.methods, ([0, 1, 2], [2, 1, 0], [0, 1, 2]), strict=True):
        pipeline = builder.build(method)
        ensemble = denoiser_of(pipeline)
        ran: list[int] = []
        for number, expert in enumerate(ensemble.experts):
            first = next(expert.children())
            first.register_forward_pre_hook(lambda *_, n=number, ran=ran: ran.append(n))
        pipeline(num_inference_steps=12, output_type="latent", **DRAWS[family])
        assert list(dict.fromkeys(ran)) == order, method.fusion


def test_boundaries_are_the_same_for_every_family() -> None:
    recipe = HandOverRecipe(boundaries=[0.7, 0.3])
    with refusal("AFA-FUSION-003", r"\[0\.7, 0\.3\]", "1", "1000"):
        recipe.check(3, 7.5)
    with refusal("AFA-FUSION-003", "1", "500"):
        HandOverRecipe(boundaries=[700.0, 300.0]).schedule(3, 500)
    HandOverRecipe(boundaries=[1500.0, 300.0]).check(3, 7.5)  # of a scheduler with 2000, perhaps


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_plan_of_a_flow_model_has_ranges_that_its_timesteps_are_in(
    family: str, tmp_path: Path
) -> None:
    pipeline = pipeline_of(family, tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    ensemble = afa.EnsembleDenoiser(
        [pipeline.transformer] * 2,
        afa.SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4),
    )
    pipeline.register_modules(transformer=ensemble)
    size = {"height": 16, "width": 16}
    drawing = calibrate(pipeline, ["a fox"], num_steps=8, num_ranges=2, batch_size=1, **size)
    while True:
        try:
            next(drawing)
        except StopIteration as stop:
            shares = stop.value
            break
    half = highest_timestep(ensemble.family, 1000) / 2
    assert [part.above for part in shares.plan(0.9).ranges] == [half, None]
    site = ensemble.sites[0].name
    for part in range(2):
        assert shares.mean(part, site).sum() == pytest.approx(1)


def test_by_default_magic_fusion_fuses_the_first_step_of_a_flow_model_too() -> None:
    early, late = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    late[1] = torch.randn(4, 8, 8)
    latent = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    condition = Condition(torch.full((2,), 1000.0), torch.zeros(2, 3), None, latent)
    weights = MagicFusion(50.0)([early, late], condition).weights
    assert weights is not None
    assert 0 < weights[:, 1].mean() < 1
