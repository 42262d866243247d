"""Drafts: what a judge recognises, what follows from it, and what is refused."""

from __future__ import annotations

import copy
import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler

import afa
from afa.aggregators import SABWConfig
from afa.aggregators.fusion.magic_fusion import MagicFusion
from afa.aggregators.fusion.mean import feature_mean
from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.drafting import Drafter, DraftsRecipe, recognise, routed, use_drafts
from afa.drafting.drafter import blurred
from afa.ensemble.regions import Regions
from afa.errors import AfaError
from afa.loading.pipeline import load_single, with_rules
from afa.loading.task import native_resolution
from afa.training import SceneImages
from afa.training.encoding import encode_pictures
from afa.training.transform import Transform
from afa.zoo.scenes import parse_caption
from tests.loading.test_lora import lora_of
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES, saved_experts

PROMPTS = ["a fox on the left", "a pizza"]
CALL: dict[str, Any] = {"guidance_scale": 3.0, "height": 16, "width": 16}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(len(PROMPTS))]


def drawn(pipeline: DiffusionPipeline, num_steps: int = 3) -> torch.Tensor:
    """The latents of both prompts."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(
            PROMPTS,
            num_inference_steps=num_steps,
            generator=generators(),
            output_type="latent",
            **CALL,
        ).images


def with_means(folders: list[Path]) -> DiffusionPipeline:
    """An ensemble that was never trained."""
    pipeline = afa.load_pipeline(folders, allow_duplicates=True)
    return with_rules(pipeline, feature_mean(denoiser_of(pipeline).sites))


def settings(judge: Path, **changes: Any) -> DraftsRecipe:
    return DraftsRecipe(**{"judge": str(judge), "num_steps": 2, "num_levels": 2, **changes})


def drafter_of(pipeline: DiffusionPipeline, drafts: DraftsRecipe) -> Drafter:
    use_drafts(pipeline, drafts)
    drafter, denoiser_of(pipeline).drafter = denoiser_of(pipeline).drafter, None
    return drafter


@pytest.mark.slow
def test_the_base_recognises_a_scene_and_where_its_objects_are() -> None:
    judge, _ = load_single("zoo:base")
    scenes = SceneImages(32, seed=8, kind="mixed")
    transform = Transform(64)
    pictures = [scenes[n] for n in range(32)]
    pixels = torch.stack([transform(p, n, 0) for n, (p, _) in enumerate(pictures)])
    vae = judge.vae
    latents = encode_pictures(judge, pixels).mean * vae.config.scaling_factor
    captions = [caption for _, caption in pictures]
    shown = [parse_caption(caption) for caption in captions]
    swapped = [
        caption.replace(s.left, "?").replace(s.right, s.left).replace("?", s.right)
        for s, caption in zip(shown, captions, strict=True)
    ]
    right, wrong = (
        recognise(judge, latents, each, range(32)).mean(1) for each in (captions, swapped)
    )
    assert right.shape == (32, 16, 16)
    better = right - wrong
    for half in (slice(0, 8), slice(8, 16)):
        assert (better[:, :, half].mean((1, 2)) > 0).float().mean() > 0.9


def test_what_a_judge_says_of_a_picture_depends_on_nothing_else(experts: list[Path]) -> None:
    judge, _ = load_single(experts[0])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = recognise(judge, latents, PROMPTS, [3, 4], num_levels=3)
    assert found.shape == (2, 3, 8, 8)
    for n in range(2):
        alone = recognise(judge, latents[n:][:1], PROMPTS[n:][:1], [3 + n], num_levels=3)
        torch.testing.assert_close(found[n:][:1], alone, rtol=0, atol=1e-5)
    other = recognise(judge, latents, PROMPTS, [5, 6], num_levels=3)
    assert not torch.allclose(found, other, atol=1e-3)
    assert not recognise(judge, latents, ["", ""], [3, 4], num_levels=3).any()


def test_noise_with_both_signs_cancels_what_is_linear_in_it(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge whose predictions are constants c and 0: |c - e|^2 - |e|^2 = |c|^2 - 2 c e."""
    judge, _ = load_single(experts[0])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def constant(_: Any, __: Any, noisy: torch.Tensor, *___: Any, **____: Any) -> torch.Tensor:
        half = torch.ones_like(noisy)
        half[: len(noisy) // 2] = 0  # with prompt
        return half

    conditioning = replace(conditioning_of(judge), predict=constant)
    monkeypatch.setattr("afa.drafting.recognition.conditioning_of", lambda _: conditioning)
    found = recognise(judge, latents, ["a fox"], [1], num_levels=2)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_draft_is_what_the_expert_draws_alone(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    drafter = drafter_of(pipeline, settings(experts[2]))
    for n, folder in enumerate(experts):
        alone, _ = load_single(folder)
        draft = drafter._draft(pipeline, n, PROMPTS, generators(), CALL)
        torch.testing.assert_close(draft, drawn(alone, num_steps=2), rtol=0, atol=1e-5)


def test_experts_that_are_equal_are_not_told_apart(experts: list[Path]) -> None:
    pipeline = with_means([experts[0]] * 2)
    drafter = drafter_of(pipeline, settings(experts[1]))
    assert not drafter.bias(pipeline, PROMPTS, generators(), **CALL).any()


def test_a_judgement_no_better_than_chance_is_shrunk(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = with_means(experts)
    drafter = drafter_of(pipeline, settings(experts[1], num_levels=5))
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(3, 1, 16, 16)

    def judged(_: Any, latents: torch.Tensor, *__: Any) -> torch.Tensor:
        del latents
        expert = next(counter) % 3
        return torch.randn(2, 5, 16, 16, generator=generator) + signal[expert]

    monkeypatch.setattr("afa.drafting.drafter.recognise", judged)
    counter = itertools.count()
    chance = drafter.bias(pipeline, PROMPTS, generators(), **CALL)
    signal[1] = 3.0
    counter = itertools.count()
    clear = drafter.bias(pipeline, PROMPTS, generators(), **CALL)
    assert chance.softmax(1).amax(1).mean() < 0.6
    assert clear.softmax(1)[:, 1].min() > 0.99


def test_a_picture_does_not_depend_on_its_batch(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    drafter = drafter_of(pipeline, settings(experts[2]))
    both = drafter.bias(pipeline, PROMPTS, generators(), **CALL)
    for n in range(2):
        alone = drafter.bias(pipeline, PROMPTS[n:][:1], generators()[n:][:1], **CALL)
        torch.testing.assert_close(both[n:][:1], alone, rtol=0, atol=1e-3)


def test_two_threads_draw_one_after_the_other(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    use_drafts(pipeline, settings(experts[2]))
    found: dict[int, torch.Tensor] = {}

    def draw(number: int) -> None:
        own = copy.copy(pipeline)  # a stock pipeline's scheduler has a state
        own.register_modules(scheduler=copy.deepcopy(pipeline.scheduler))
        with routed(own, PROMPTS, generators(), **CALL):
            found[number] = drawn(own)

    threads = [threading.Thread(target=draw, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])
    with routed(pipeline, PROMPTS, generators(), **CALL):
        assert torch.equal(drawn(pipeline), found[0])
        with (
            refusal("AFA-DRAFT-005"),
            routed(pipeline, PROMPTS, generators(), **CALL),
        ):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind not in ("refiner", "dit")])
def test_other_kinds_draw_by_drafts(kind: str, tmp_path: Path) -> None:
    folders = saved_experts(kind, tmp_path)
    pipeline = with_means(folders)
    pipeline.set_progress_bar_config(disable=True)
    kind_of = kind_of_pipeline(pipeline)
    call: dict[str, Any] = {**kind_of.guide(3.0), **kind_of.call}
    if kind == "z-image":  # its own default are 1024 pixels, whatever the model
        call |= {"height": 64, "width": 64}
    drafter = drafter_of(pipeline, settings(folders[2]))
    for n, folder in enumerate(folders):
        alone, _ = load_single(folder)
        alone.set_progress_bar_config(disable=True)
        own = generators()
        expected = alone(
            prompt=list(PROMPTS), num_inference_steps=2, generator=own, output_type="latent", **call
        ).images
        draft = drafter._draft(pipeline, n, PROMPTS, generators(), call)
        assert draft.ndim == 4
        unpack = conditioning_of(alone).unpack
        if unpack is not None:
            expected = unpack(alone, expected, *native_resolution(alone))
        torch.testing.assert_close(draft, expected, rtol=1e-3, atol=1e-3)
    use_drafts(pipeline, settings(folders[2]))
    with routed(pipeline, PROMPTS, generators(), **call):
        pictures = pipeline(
            prompt=list(PROMPTS),
            num_inference_steps=2,
            generator=generators(),
            output_type="np",
            **call,
        ).images
    assert np.isfinite(pictures).all()


def test_drafts_in_half_precision_by_a_judge_with_a_lora(
    experts: list[Path], tmp_path: Path
) -> None:
    lora = tmp_path / "judge.safetensors"
    lora_of(load_single(experts[0])[0], lora, seed=1)
    pipeline = afa.load_pipeline(experts, torch_dtype=torch.bfloat16)
    pipeline = with_rules(pipeline, feature_mean(denoiser_of(pipeline).sites))
    identities, found = set(), []
    for scale in (0.5, 4.0):
        judge = {"base": str(experts[0]), "lora": str(lora), "scale": scale}
        use_drafts(pipeline, DraftsRecipe.model_validate({"judge": judge, "num_levels": 2}))
        identities.add(denoiser_of(pipeline).drafter.identity)
        with routed(pipeline, PROMPTS, generators(), **CALL):
            found.append(drawn(pipeline))
    assert len(identities) == 2
    assert not torch.equal(found[0], found[1])
    assert found[0].dtype == torch.bfloat16


def test_pictures_are_routed_only_inside_the_block(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    plain = drawn(pipeline)
    use_drafts(pipeline, settings(experts[2]))
    with refusal("AFA-ENSEMBLE-062", "routed"):
        drawn(pipeline)
    ensemble = denoiser_of(pipeline)
    with afa.record_weights(ensemble) as record, routed(pipeline, PROMPTS, generators(), **CALL):
        found = drawn(pipeline)
    assert not torch.equal(found, plain)
    assert len(record.steps) == 3, "drafts are not recorded"
    assert ensemble.regions is None
    use_drafts(pipeline, None)
    assert torch.equal(drawn(pipeline), plain)


def test_a_strict_judgement_is_the_expert_alone(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    bias = torch.zeros(2, 3, 1, 1)
    bias[0, 1], bias[1, 2] = 200, 200
    denoiser_of(pipeline).regions = Regions(bias)
    found = drawn(pipeline)
    for picture, expert in enumerate((1, 2)):
        alone = drawn(load_single(experts[expert])[0])
        torch.testing.assert_close(found[picture], alone[picture], rtol=0, atol=1e-5)


def test_an_untrained_aggregator_is_the_mean_with_a_bias_as_well(experts: list[Path]) -> None:
    bias = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    small = SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
    found = []
    for pipeline in (with_means(experts), afa.load_pipeline(experts, small)):
        denoiser_of(pipeline).regions = Regions(bias)
        found.append(drawn(pipeline))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregators", ["ignore", "keep"])
def test_trained_aggregators_are_ignored_or_kept(aggregators: str, experts: list[Path]) -> None:
    small = SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
    trained, plain = afa.load_pipeline(experts, small), with_means(experts)
    for rule in denoiser_of(trained).aggregators:
        torch.nn.init.normal_(rule.conv_out.weight)
    found = []
    for pipeline in (trained, plain):
        use_drafts(pipeline, settings(experts[2], aggregators=aggregators))
        with routed(pipeline, PROMPTS, generators(), **CALL):
            found.append(drawn(pipeline))
    is_same = torch.allclose(found[0], found[1], rtol=0, atol=1e-5)
    assert is_same == (aggregators == "ignore")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_schedule_or_a_plan_beside_drafts(is_first: bool, experts: list[Path]) -> None:
    pipeline = with_means(experts)
    ensemble = denoiser_of(pipeline)
    if is_first:
        ensemble.schedule = lambda _: [0]
        with refusal("AFA-ENSEMBLE-018", "schedule"):
            use_drafts(pipeline, settings(experts[1]))
        return
    use_drafts(pipeline, settings(experts[1]))
    with refusal("AFA-ENSEMBLE-018", "drafts"):
        ensemble.schedule = lambda _: [0]


def test_several_pictures_of_a_prompt_are_refused(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    use_drafts(pipeline, settings(experts[1]))
    many = {**CALL, "num_images_per_prompt": 2}
    with refusal("AFA-DRAFT-006"), routed(pipeline, PROMPTS, generators(), **many):
        pass


def test_another_batch_is_refused(experts: list[Path]) -> None:
    pipeline = with_means(experts)
    denoiser_of(pipeline).regions = Regions(torch.zeros(3, 3, 2, 2))
    with refusal("AFA-ENSEMBLE-061", "3 pictures", "4"):
        drawn(pipeline)


def test_what_cannot_be_judged(experts: list[Path], tmp_path: Path) -> None:
    alone, _ = load_single(experts[0])
    with refusal("AFA-DRAFT-001"):
        use_drafts(alone, settings(experts[1]))
    other = tiny_pipeline(tmp_path / "tokenizer", seed=7)
    other.vae.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "other")
    with refusal("AFA-DRAFT-002", "0.5"):
        use_drafts(with_means(experts), settings(tmp_path / "other"))
    edm = tiny_pipeline(tmp_path / "tokenizer", seed=7)
    edm.scheduler = EDMEulerScheduler()
    edm.save_pretrained(tmp_path / "edm")
    with refusal("AFA-DRAFT-004", "judge"):
        use_drafts(with_means(experts), settings(tmp_path / "edm"))
    masking = with_means(experts)
    denoiser_of(masking).on_nonfinite = "mask"
    with refusal("AFA-DRAFT-003"):
        use_drafts(masking, settings(experts[1]))
    pipeline = with_means(experts)
    ensemble = denoiser_of(pipeline)
    ensemble.aggregators = torch.nn.ModuleList(MagicFusion() for _ in ensemble.sites)
    with refusal("AFA-ENSEMBLE-054"):
        use_drafts(pipeline, settings(experts[1]))


def test_an_interrupted_draft_leaves_the_ensemble_as_it_was(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = with_means(experts)
    plain = drawn(pipeline)
    use_drafts(pipeline, settings(experts[1]))
    ensemble = denoiser_of(pipeline)

    def fail(*_: Any, **__: Any) -> None:
        raise AfaError("AFA-TEST-001", "as if memory ran out")

    monkeypatch.setattr("afa.drafting.drafter.recognise", fail)
    with refusal("AFA-TEST-001"), routed(pipeline, PROMPTS, generators(), **CALL):
        pass
    assert (ensemble.schedule, ensemble.is_drafting, ensemble.regions) == (None, False, None)
    assert ensemble.drafter.thread is None
    with refusal("AFA-ENSEMBLE-062"):
        drawn(pipeline)
    use_drafts(pipeline, None)
    assert torch.equal(drawn(pipeline), plain)


def test_a_blur_keeps_the_mean_of_what_is_constant() -> None:
    flat = torch.full((2, 3, 5, 7), 2.5)
    torch.testing.assert_close(blurred(flat, 2.0), flat)
    sharp = torch.zeros(9, 9)
    sharp[4, 4] = 1
    assert torch.equal(blurred(sharp, 0), sharp)
    assert blurred(sharp, 1.0)[4, 4] == blurred(sharp, 1.0).max()
