"""Experts of different architectures in one ensemble, whose predictions are fused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from copy import copy as copy_of
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from safetensors.torch import load_file

import afa
from afa.aggregators.fusion.shell import ShellRecipe
from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.denoisers.objective import convert, objective_of
from afa.denoisers.two_streams import GRID
from afa.drawing.contenders import MERGE, Contenders
from afa.drawing.merged import merged_pipeline
from afa.evaluation import evaluate, load_evaluate_recipe
from afa.loading.pipeline import load_single, with_rules
from afa.loading.task import size_multiple
from afa.loading.truncation import limits_of
from afa.merging import WeightedSum
from afa.preflight.inputs import inputs_of_training
from afa.preflight.run import look
from afa.training.planned import plan_of_training
from afa.training.recipe import Recipe
from tests.ensemble.caching.test_graphs import Replays
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import saved_experts, tiny_vae
from tests.training.runs import as_written, steps_of

SMALL = afa.SABWConfig(
    hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4, hidden_ratio=None, min_scale=1
)
SCHEDULER = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
PROMPT, NEGATIVE = "a fox in the snöw", "a pizza"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of seven architectures with one autoencoder; all that predict noise use DDIM."""
    root = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(5)
    vae = tiny_vae(4)
    made = {"sd": root / "sd"}
    tiny_pipeline(root / "tokenizer", seed=3).save_pretrained(made["sd"])
    for kind in ("xl", "pixart", "sd3", "flux", "chroma", "z-image"):
        (made[kind],) = saved_experts(kind, root / kind, count=1)
    for kind, folder in made.items():
        shutil.rmtree(folder / "vae")
        vae.save_pretrained(folder / "vae")
        if kind in ("flux", "chroma", "z-image"):
            FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
        if kind not in ("sd3", "flux", "chroma", "z-image"):
            SCHEDULER.save_pretrained(folder / "scheduler")
            index = json.loads((folder / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", "DDIMScheduler"]
            (folder / "model_index.json").write_text(json.dumps(index))
    return made


def loaded(folders: dict[str, Path], *kinds: str, **changes: Any) -> Any:
    given = {"fuse": "predictions", **changes}
    pipeline: Any = afa.load_pipeline([folders[kind] for kind in kinds], SMALL, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def alone(pipeline: Any, expert: int) -> Any:
    rules = ShellRecipe(expert=expert).rules(denoiser_of(pipeline).sites)
    return with_rules(pipeline, rules)


def latents(pipeline: Any, prompt: Any = PROMPT, **call: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    known = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    size = {"height": 16, "width": 24}
    call = {**dict(kind_of_pipeline(pipeline).call), **known, **size, **call}
    return pipeline(prompt, generator=torch.Generator().manual_seed(1), **call).images.numpy()


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("first", ["sd", "xl", "pixart"])
def test_each_expert_draws_as_in_its_own_pipeline(
    folders: dict[str, Path], first: str, negative: str | None
) -> None:
    """With its own text encoders and size conditions, guidance and prompts of any length."""
    kinds = [first, *(kind for kind in ("sd", "xl", "pixart") if kind != first)]
    pipeline = loaded(folders, *kinds)
    given = {} if negative is None else {"negative_prompt": negative}
    for n, kind in enumerate(kinds):
        own = load_single(str(folders[kind]))[0]
        np.testing.assert_allclose(
            latents(alone(pipeline, n), **given), latents(own, **given), atol=2e-5, err_msg=kind
        )


def test_a_batch_of_prompts_and_several_pictures(folders: dict[str, Path]) -> None:
    pipeline = alone(loaded(folders, "sd", "pixart"), 1)
    own = load_single(str(folders["pixart"]))[0]
    prompts = ["a fox", "æ pizza " * 9, ""]
    both = [latents(each, prompts, num_images_per_prompt=2) for each in (pipeline, own)]
    assert both[0].shape[0] == 6
    np.testing.assert_allclose(*both, atol=2e-5)  # type: ignore[call-overload]


@pytest.mark.parametrize("kinds", [("flux", "chroma", "z-image"), ("chroma", "flux", "z-image")])
def test_a_pipeline_that_packs_latents(folders: dict[str, Path], kinds: tuple[str, ...]) -> None:
    """Without a second pass; Flux embeds a scale of guidance, which others do not know."""
    pipeline = loaded(folders, *kinds)
    scales = {"flux": 3.5, "chroma": 1.0, "z-image": 0.0}
    for n, kind in enumerate(kinds):
        right = latents(load_single(str(folders[kind]))[0], guidance_scale=scales[kind])
        if kind == "z-image":
            right = GRID.pack(torch.from_numpy(right)).numpy()
        found = latents(alone(pipeline, n), guidance_scale=scales[kinds[0]])
        np.testing.assert_allclose(found, right, atol=2e-5, err_msg=kind)
    steps = list(
        steps_of(
            recipe_of([folders[kind] for kind in kinds]), folders["sd"].parent / "-".join(kinds)
        )
    )
    assert all(np.isfinite(step.loss) for step in steps)


@pytest.mark.parametrize("kind", ["sd3", "flux", "chroma", "z-image"])
def test_a_flow_beside_noise(folders: dict[str, Path], kind: str) -> None:
    """Its prediction is its own pipeline's, at its own timestep, converted into noise."""
    pipeline = loaded(folders, "sd", kind)
    ensemble = alone(pipeline, 1).unet
    own = load_single(str(folders[kind]))[0]
    torch.manual_seed(2)
    noisy, steps = torch.randn(2, 4, 8, 8), torch.tensor([300, 300])
    text = pipeline.encode_prompt([PROMPT, NEGATIVE], "cpu", 1, False)[0]
    wanted, flow = objective_of(pipeline.scheduler), objective_of(own.scheduler)
    assert wanted is not None
    assert flow is not None
    angle = wanted.angle(steps)
    level = flow.level(angle)
    seen = noisy * level.norm.view(-1, 1, 1, 1)
    conditioning = conditioning_of(own)
    with torch.no_grad():
        found = ensemble(noisy, steps, text, return_dict=False)[0]
        right = conditioning.predict(
            own,
            denoiser_of(own),
            seen,
            flow.timestep(angle),
            conditioning.encode(own, [PROMPT, NEGATIVE]),
        )
    right = convert(right, seen, (flow, level), (wanted, wanted.level(angle)))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = loaded(folders, "xl", "pixart", "sd")
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight)
    right = latents(pipeline)
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    assert json.loads((folder / "config.json").read_text())["fuse"] == "predictions"
    again = afa.load_ensemble(folder)
    assert [site.name for site in again.unet.sites] == ["out"]
    np.testing.assert_array_equal(latents(again), right)


def test_other_pipelines_take_it(folders: dict[str, Path]) -> None:
    for kinds, other in (
        (("sd", "pixart"), StableDiffusionImg2ImgPipeline),
        (("xl", "pixart"), StableDiffusionXLImg2ImgPipeline),
    ):
        pipeline = loaded(folders, *kinds)
        drawn = other(**pipeline.components)
        drawn.set_progress_bar_config(disable=True)
        assert drawn("a fox", image=torch.rand(1, 3, 16, 16), num_inference_steps=4).images


def test_weights_are_recorded_and_steered(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders, "sd", "xl", "pixart")
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight)
    with afa.record_weights(pipeline.unet) as record:
        before = latents(pipeline)
    assert record.steps[0].weights["out"].shape[1] == 3
    afa.steer(pipeline.unet, {"1": 60.0})
    np.testing.assert_allclose(latents(pipeline), latents(alone(pipeline, 1)), atol=1e-4)
    assert np.abs(before - latents(pipeline)).max() > 1e-2


def test_what_cannot_be_together_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with refusal("AFA-LOAD-002", "fuse = predictions"):
        afa.load_pipeline([folders["sd"], folders["xl"]])
    with refusal("AFA-LOAD-107", "must be one of Stable Diffusion, .*List another expert first"):
        loaded(folders, "sd3", "flux")
    with refusal("AFA-LOAD-108"):
        loaded(folders, "sd", "xl", place="stream")
    plans: list[Any] = []
    with refusal("AFA-LOAD-108"):
        loaded(folders, "sd", "xl", memory_budget="1GB", on_plan=plans.append)
    assert not plans, "no plan is shown of what is refused"
    with refusal("AFA-LOAD-106", "DiT"):
        loaded({**folders, "dit": saved_experts("dit", tmp_path / "dit", count=1)[0]}, "sd", "dit")
    other = tmp_path / "other"
    shutil.copytree(folders["xl"], other)
    torch.manual_seed(6)
    shutil.rmtree(other / "vae")
    tiny_vae(4).save_pretrained(other / "vae")
    with refusal("AFA-LOAD-109", "share one latent space"):
        loaded({**folders, "other": other}, "sd", "other")


def test_what_only_one_expert_could_use_is_refused(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders, "sd", "xl")
    text = pipeline.encode_prompt("a fox", "cpu", 1, False)[0]
    call = torch.randn(1, 4, 8, 8), torch.tensor(3)
    with refusal("AFA-MODEL-061", "mid_block_additional_residual"):
        pipeline.unet(*call, text, mid_block_additional_residual=torch.zeros(1))
    with refusal("AFA-MODEL-062"):
        pipeline.unet(*call, text[..., :16])
    with refusal("AFA-ENSEMBLE-066", "tokenizer"):
        pipeline.text_encoder(torch.tensor([[1, 2]]))
    with refusal("AFA-ENSEMBLE-067"):
        pipeline.load_textual_inversion({"<x>": torch.zeros(1, 16)}, token="<x>")


def recipe_of(experts: list[Path]) -> Recipe:
    """A short training without a cache."""
    data = {"scenes": {"num_samples": 6}, "resolution": 16, "cache": False}
    return Recipe.model_validate({**as_written(experts, data, num_steps=2), "fuse": "predictions"})


def test_noise_on_the_prompt_needs_no_own_timestep_embedding(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """XL's contains the pooled prompt, but aggregators of predictions see the noise level alone."""
    asked = recipe_of([folders["xl"], folders["sd"]])
    losses = [
        [step.loss for step in steps_of(with_noise(asked, level), tmp_path / str(level))]
        for level in (0.0, 0.5)
    ]
    # before the first step, aggregators have no output and the prompt has no effect
    assert losses[0][0] == losses[1][0]
    weights = [load_file(tmp_path / level / "aggregators.safetensors") for level in ("0.0", "0.5")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def with_noise(recipe: Recipe, level: float) -> Recipe:
    training = recipe.training.model_copy(update={"prompt_noise": level})
    return recipe.model_copy(update={"training": training})


def test_trained_from_a_recipe(folders: dict[str, Path], tmp_path: Path) -> None:
    """Aggregators alone change, at an adequate size by default; caches keep all prompts apart."""
    data: dict[str, Any] = {"scenes": {"num_samples": 12}, "resolution": 16}
    losses = []
    for name, cache in (("live", False), ("cached", True)):
        given = {**data, "cache": cache, **({"cache_folder": str(tmp_path / "c")} if cache else {})}
        asked = as_written([folders["sd"], folders["pixart"]], given, num_steps=3)
        asked["fuse"] = "predictions"
        asked["previews"] = {"prompts": ["a fox"], "every": 3, "num_steps": 1}
        recipe = Recipe.model_validate(asked)
        assert (recipe.aggregator.hidden_ratio, recipe.aggregator.min_scale) == (None, 1)
        losses.append([step.loss for step in steps_of(recipe, tmp_path / name)])
        report = look(plan_of_training(recipe), with_weights=False)
        assert not report.errors
        (estimate,) = report.estimates.values()
        assert estimate.takes > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = afa.load_ensemble(tmp_path / "live")
    assert again.unet.aggregators[0].conv_out.weight.abs().max() > 0
    assert again.unet.aggregators[0].config.hidden_ratio is None
    for kind, expert in zip(("sd", "pixart"), again.unet.experts, strict=True):
        own = denoiser_of(load_single(str(folders[kind]))[0]).state_dict()
        for name, tensor in expert.denoiser.state_dict().items():
            assert torch.equal(tensor, own[name])


def test_contenders_are_the_experts(folders: dict[str, Path]) -> None:
    contenders = Contenders(loaded(folders, "sd", "xl", "pixart"))
    assert MERGE not in contenders.names
    for kind, name in zip(("sd", "xl", "pixart"), contenders.names, strict=False):
        own = load_single(str(folders[kind]))[0]
        drawn = latents(contenders.pipeline(name))
        np.testing.assert_allclose(drawn, latents(own), atol=2e-5, err_msg=kind)
    with refusal("AFA-DRAW-018"):
        merged_pipeline(loaded(folders, "sd", "xl"), WeightedSum(None))


def test_what_changes_blocks_is_refused(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders, "sd", "xl")
    with refusal("AFA-MODEL-063", "enable_freeu"):
        pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with refusal("AFA-ENSEMBLE-072", "fuse: predictions"):
        pipeline.unet.graphs = Replays()
    with refusal("AFA-MODEL-063", "fuse_qkv_projections"):
        pipeline.fuse_qkv_projections()


def randomised(folders: dict[str, Path], *kinds: str) -> Any:
    torch.manual_seed(4)
    pipeline = loaded(folders, *kinds)
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight, std=0.3)
    return pipeline


SWITCHES: dict[str, Callable[[Any], object]] = {
    "several devices": lambda e: e.place_experts(["cpu"] * 3),
    "offloading": lambda e: e.offload_experts("cpu"),
    "no bias": lambda e: afa.steer(e, {"1": 0.0}),
    "a schedule of all": lambda e: setattr(e, "schedule", lambda _: [0, 1, 2]),
    "a cache that never holds": lambda e: setattr(
        e, "acceleration", afa.Acceleration(interval=3, fresh=0, drift=1e-9)
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_changes_nothing(folders: dict[str, Path], name: str) -> None:
    right = latents(randomised(folders, "sd", "xl", "pixart"))
    pipeline = randomised(folders, "sd", "xl", "pixart")
    SWITCHES[name](pipeline.unet)
    np.testing.assert_allclose(latents(pipeline), right, atol=2e-5)


def test_predictions_are_reused(folders: dict[str, Path]) -> None:
    """With an interval of two, every second step repeats the prediction of the one before."""
    pipeline = randomised(folders, "sd", "xl")
    afa.accelerate(pipeline, afa.Acceleration(interval=2, fresh=0))
    text = pipeline.encode_prompt("a fox", "cpu", 1, False)[0]
    torch.manual_seed(0)
    noisy = torch.randn(1, 1, 4, 8, 8) + 0.1 * torch.randn(3, 1, 4, 8, 8)
    with torch.no_grad():
        steps = zip(noisy, (900, 700, 500), strict=True)
        found = [pipeline.unet(x, torch.tensor(t), text).sample for x, t in steps]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    afa.accelerate(pipeline, "fast")
    assert pipeline.unet.acceleration.fresh == 0
    with refusal("AFA-ENSEMBLE-068", "fresh to 0"):
        afa.accelerate(pipeline, afa.Acceleration(interval=2))


def test_an_expert_that_is_not_finite_is_named_or_left_out(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders, "sd", "xl", "pixart")
    right = latents(with_rules(pipeline, pipeline.unet.aggregators, lambda _: [0, 2]))
    pipeline.unet.experts[1].denoiser.conv_out.weight.data[:] = float("nan")
    with refusal("AFA-ENSEMBLE-033", "expert0", "out"):
        latents(pipeline)
    pipeline.unet.on_nonfinite = "mask"
    np.testing.assert_allclose(latents(pipeline), right, atol=1e-4)


def test_limits_are_those_of_all_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    """A long prompt and an odd size are said for the expert that cannot take them."""
    pipeline = loaded(folders, "sd", "pixart")
    names = [name for limit in limits_of(pipeline) for name in limit.names]
    assert names == ["tokenizer", "PixArt's tokenizer"]
    assert size_multiple(loaded(folders, "sd", "xl")) * 2 == size_multiple(pipeline)
    asked = as_written([folders["sd"], folders["pixart"]], None, num_steps=1)
    asked |= {"fuse": "predictions", "previews": {"prompts": ["a fox " * 400], "every": 1}}
    found = inputs_of_training(Recipe.model_validate(asked), None, lambda *_: None)
    said = [finding.text for finding in found.findings if finding.check == "previews"]
    assert len(said) == 2


def test_it_is_a_row_of_a_comparison(folders: dict[str, Path], tmp_path: Path) -> None:
    """Also with a preset, which reuses predictions; the calls of all experts are counted."""
    saved = str(afa.save_ensemble(loaded(folders, "xl", "pixart", "sd"), tmp_path / "ensemble"))
    recipe = {
        "prompts": {"text": str(tmp_path / "prompts.txt")},
        "methods": [
            {"name": "mixed", "ensemble": saved},
            {"name": "fast", "ensemble": saved, "acceleration": "fast"},
        ],
        "sampling": {"num_steps": 2, "device": "cpu", "height": 16, "width": 16},
        "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
        "num_resamples": 100,
    }
    (tmp_path / "prompts.txt").write_text("a fox\na pizza\n")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for _ in evaluate(load_evaluate_recipe(tmp_path / "recipe.yaml"), tmp_path / "report"):
        pass
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["mixed", "fast"]


def test_a_changed_scheduler_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "pixart"
    shutil.copytree(folders["pixart"], copy)
    config = copy / "scheduler" / "scheduler_config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "beta_end": 0.03}))
    asked = recipe_of([folders["sd"], copy])
    asked = asked.model_copy(
        update={"training": asked.training.model_copy(update={"num_steps": 4})}
    )
    list(itertools.islice(steps_of(asked, tmp_path / "run"), 2))
    saved = afa.save_ensemble(loaded({**folders, "copy": copy}, "sd", "copy"), tmp_path / "saved")
    afa.load_ensemble(saved)
    config.write_text(json.dumps({**json.loads(kept), "beta_end": 0.04}))
    with refusal("AFA-LOAD-123", "scheduler_config.json"):
        afa.load_ensemble(saved)
    with refusal("AFA-TRAIN-005", "noise schedules"):
        list(steps_of(asked, tmp_path / "run"))


def test_changed_embeddings_are_refused(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders, "sd", "xl")
    text, without = pipeline.encode_prompt("a fox", "cpu", 1, True, negative_prompt=NEGATIVE)
    given = {"negative_prompt_embeds": without}
    right = latents(pipeline, "a fox", negative_prompt=NEGATIVE)
    np.testing.assert_allclose(
        latents(pipeline, None, prompt_embeds=text, **given), right, atol=2e-5
    )
    weighted = text.clone()
    weighted[:, 3] *= 1.5
    with refusal("AFA-MODEL-064", "weights of words"):
        latents(pipeline, None, prompt_embeds=weighted, **given)
    assert copy_of(pipeline.tokenizer)("a fox").input_ids == pipeline.tokenizer("a fox").input_ids
