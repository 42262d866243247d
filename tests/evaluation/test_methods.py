"""Every way to draw, as a stock pipeline; and what a picture costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pydantic import ValidationError

import afa
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.evaluation.cost import measure
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe
from afa.evaluation.work import draw
from afa.loading.expert import load_expert
from afa.loading.expert_source import ExpertSource
from afa.loading.lora import lora_expert
from afa.loading.vocabulary import write_words
from afa.merging.in_memory import weighted_merge
from tests.evaluation.conftest import SMALL
from tests.loading.test_lora import lora_of
from tests.refusal import refusal
from tests.tiny_pipelines import PIPELINES

PROMPTS = ["a fox on the left and a pizza on the right, blue background"] * 2


def builder(**changes: Any) -> tuple[MethodBuilder, EvaluateRecipe]:
    recipe = EvaluateRecipe.model_validate({**SMALL, **changes})
    return MethodBuilder(recipe, recipe.sampling, torch.device("cpu")), recipe


def pictures(pipeline: StableDiffusionPipeline, recipe: EvaluateRecipe) -> np.ndarray:
    drawn = draw(pipeline, PROMPTS, range(2), 0, 2, recipe.sampling)
    return np.stack([np.asarray(picture) for picture in drawn])


def test_a_model_is_drawn_as_the_library_draws_it() -> None:
    build, recipe = builder()
    ours = pictures(build.build(recipe.methods[1]), recipe)
    stock = StableDiffusionPipeline.from_pretrained(
        afa.zoo.expert_folder("animals"), safety_checker=None
    )
    stock.set_progress_bar_config(disable=True)
    assert (ours == pictures(stock, recipe)).all()
    assert (ours[0] != ours[1]).any(), "each place has its own noise"


def test_a_merge_is_of_unet_and_text_encoder() -> None:
    build, recipe = builder()
    pipeline = build.build(recipe.methods[5])
    assert not isinstance(pipeline.unet, EnsembleDenoiser)
    experts = [afa.loading.expert.load_expert(f"zoo:{name}") for name in ("animals", "food")]
    parts = {
        "unet": [expert.denoiser for expert in experts],
        "text_encoder": [expert.text_encoders["text_encoder"] for expert in experts],
    }
    for part, models in parts.items():
        expected = weighted_merge(models).state_dict()
        merged = getattr(pipeline, part).state_dict()
        assert all(torch.equal(merged[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "add_difference", "weights": [0.9, 0.9]},
        {"method": "slerp"},
        {"method": "ties", "density": 0.5},
        {"method": "dare", "density": 0.5},
        {"method": "block_weights", "block_weights": {"default": [1.0, 0.0], "mid": [0.0, 1.0]}},
    ],
)
def test_every_merge_draws(merge: dict[str, Any]) -> None:
    build, recipe = builder(methods=[{"name": "merge", "merge": merge}])
    drawn = pictures(build.build(recipe.methods[0]), recipe)
    uniform = pictures(builder()[0].build(builder()[1].methods[5]), recipe)
    assert drawn.std() > 5
    assert (drawn != uniform).any()


@pytest.mark.parametrize(
    ("fusion", "calls"),
    [
        ({"rule": "feature_mean"}, 8),  # 2 steps, 2 experts, with and without prompt
        ({"rule": "noise_mean"}, 8),
        ({"rule": "shell", "expert": 0}, 8),
        ({"rule": "magic_fusion", "temperatures": [3.0], "fuse_below": 900}, 8),
        ({"rule": "hand_over"}, 4),
        ({"rule": "hand_over", "order": [1, 0], "boundaries": [300]}, 4),
    ],
)
def test_every_fusion_draws_and_its_calls_are_counted(fusion: dict[str, Any], calls: int) -> None:
    build, recipe = builder(methods=[{"name": "fusion", "fusion": fusion}])
    pipeline = build.build(recipe.methods[0])
    with measure(pipeline) as cost:
        assert pictures(pipeline, recipe).std() > 5
    assert cost.expert_calls == calls * len(PROMPTS)
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert cost.peak_memory is None or cost.peak_memory > 50 * 2**20
    before = cost.expert_calls
    pictures(pipeline, recipe)
    assert cost.expert_calls == before, "nothing is counted outside of the block"


@pytest.mark.parametrize("given", ["", "rain"])
def test_no_negative_prompt_is_the_librarys(given: str, tmp_path: Path) -> None:
    """Stable Diffusion XL has zeros instead of an empty text, in training as in drawing."""
    pipeline: Any = PIPELINES["xl"](tmp_path)
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    pipeline.set_progress_bar_config(disable=True)
    sampling = SamplingRecipe(guidance=3.0, height=16, width=16, negative_prompt=given)
    drawn = draw(pipeline, ["a fox"], [0], 0, 2, sampling, "latent")
    noise = torch.Generator().manual_seed(0)
    expected = pipeline(
        "a fox",
        negative_prompt=given or None,
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=noise,
        output_type="latent",
    ).images
    assert torch.equal(torch.stack(drawn), expected)


def test_a_guidance_of_its_own() -> None:
    recipe = EvaluateRecipe.model_validate(
        {**SMALL, "methods": [{"name": "a", "model": "zoo:base", "guidance": 1}]}
    )
    assert recipe.sampling_of(recipe.methods[0]).guidance == 1
    assert recipe.sampling.guidance != 1


def test_the_shell_changes_nothing_in_the_zoo() -> None:
    build, recipe = builder()
    alone, shell = (pictures(build.build(recipe.methods[n]), recipe).astype(int) for n in (1, 3))
    assert abs(alone - shell).max() <= 1


def test_peak_memory_is_of_the_block_alone() -> None:
    build, recipe = builder()
    pipeline = build.build(recipe.methods[1])
    large = torch.ones(60_000_000)  # 240 MB that are gone before the block
    del large
    with measure(pipeline) as first:
        pictures(pipeline, recipe)
    with measure(pipeline) as second:
        held = torch.ones(60_000_000)
        pictures(pipeline, recipe)
    del held
    if first.peak_memory is not None and second.peak_memory is not None:
        assert second.peak_memory - first.peak_memory > 180 * 2**20


def test_an_identity_tells_checkpoints_and_settings_apart() -> None:
    _, recipe = builder()
    identities = Identities(recipe)
    seen = [str(identities.method(method, 0)) for method in recipe.methods]
    assert len(set(seen)) == len(seen)
    assert "zoo:animals" not in seen[1], "a checkpoint is told by its hash"


def test_experts_for_another_task_are_refused(tmp_path: Any) -> None:
    build, recipe = builder(methods=[{"name": "gone", "model": str(tmp_path / "gone")}])
    with refusal("AFA-LOAD-079"):
        build.build(recipe.methods[0])


def test_loras_are_experts_of_a_comparison(experts: list[Path], tmp_path: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(experts[0])
    files = [lora_of(base, tmp_path / f"{n}.safetensors", n) for n in range(2)]
    loras: list[dict[str, Any]] = [
        {"base": str(experts[0]), "lora": str(file), "scale": 0.5} for file in files
    ]
    changes: dict[str, Any] = {
        "experts": loras,
        "prompts": {"text": str(tmp_path / "prompts.txt")},
        "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
        "methods": [
            {"name": "first", "model": loras[0]},
            {"name": "merge", "merge": {"method": "weighted"}},
            {"name": "mean", "fusion": {"rule": "feature_mean"}},
        ],
    }
    build, recipe = builder(**changes)
    alone, merge, _ = (build.build(method) for method in recipe.methods)
    both = [lora_expert(load_expert(experts[0]), ExpertSource.of(lora)) for lora in loras]
    torch.testing.assert_close(alone.unet.state_dict(), both[0].denoiser.state_dict())
    expected = weighted_merge([expert.denoiser for expert in both])
    torch.testing.assert_close(merge.unet.state_dict(), expected.state_dict())
    # another scale, or another file, is another method
    identity = Identities(recipe).method(recipe.methods[0], 0)
    other = {**changes, "methods": [{"name": "first", "model": {**loras[0], "scale": 0.6}}]}
    _, recipe = builder(**other)
    assert Identities(recipe).method(recipe.methods[0], 0) != identity


def test_what_files_need_belongs_to_a_methods_identity(experts: list[Path]) -> None:
    _, recipe = builder(methods=[{"name": "one", "model": str(experts[0])}])
    identities = [Identities(recipe).method(recipe.methods[0], 0)]
    for changes in (
        {"config": str(experts[0])},
        {"config": "stable-diffusion-2"},
        {"parts": [str(experts[0])]},
        {"parts": [str(experts[1])]},
    ):
        _, recipe = builder(methods=[{"name": "one", "model": str(experts[0])}], **changes)
        identities.append(Identities(recipe).method(recipe.methods[0], 0))
    assert len({str(identity) for identity in identities}) == 5


def test_drafts_of_an_untrained_ensemble() -> None:
    drafts = {"judge": "zoo:base", "num_steps": 1, "num_levels": 2}
    fusion = {"name": "drafts", "fusion": {"rule": "feature_mean"}, "drafts": drafts}
    build, recipe = builder(methods=[fusion])
    pipeline = build.build(recipe.methods[0])
    with measure(pipeline) as cost:
        routed = pictures(pipeline, recipe)
    # two pictures, each two steps of two experts with guidance, a draft of one step by each, and
    # the judge, who looks at both drafts at two levels with both signs, with and without prompt
    assert cost.expert_calls == 2 * (2 * 2 * 2 + 1 * 2 * 2 + 2 * 2 * 2 * 2)
    assert (routed == pictures(pipeline, recipe)).all()
    plain, without = builder(methods=[{**fusion, "drafts": None}])
    assert (routed != pictures(plain.build(without.methods[0]), without)).any()


def test_drafts_belong_to_a_methods_identity() -> None:
    def of(**changes: Any) -> dict[str, Any]:
        drafts = {"judge": "zoo:base", **changes}
        fusion = {"name": "drafts", "fusion": {"rule": "feature_mean"}, "drafts": drafts}
        _, recipe = builder(methods=[fusion])
        return Identities(recipe).method(recipe.methods[0], 0)

    assert of() == of()
    changed = [of(judge="zoo:things"), of(num_steps=4), of(num_levels=4), of(sharpness=2.0)]
    assert all(each != of() for each in changed)


@pytest.mark.parametrize("kind", ["model", "merge"])
def test_drafts_of_a_single_model_are_refused(kind: str) -> None:
    given = {"model": "zoo:animals"} if kind == "model" else {"merge": {"method": "slerp"}}
    with pytest.raises(ValidationError, match="drafts"):
        builder(methods=[{"name": "one", **given, "drafts": {"judge": "zoo:base"}}])


def test_drafts_of_prompts_with_unknown_words_depend_on_the_words(
    experts: list[Path], tmp_path: Path
) -> None:
    folder = afa.save_ensemble(afa.load_pipeline(experts[:2]), tmp_path / "ensemble")
    drafts = {"judge": str(experts[2]), "num_steps": 1}

    def of(**changes: Any) -> dict[str, Any]:
        method = {"name": "one", "ensemble": str(folder), "drafts": {**drafts, **changes}}
        _, recipe = builder(methods=[method])
        return Identities(recipe).method(recipe.methods[0], 0)

    unknown = {"prompts": "unknown_words"}
    found = [of(), of(**unknown)]
    write_words(["fox"], folder)
    found += [of(), of(**unknown)]
    assert found[0] == found[2]
    assert len({str(each) for each in found}) == 3
