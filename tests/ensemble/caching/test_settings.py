"""What may be left out, and how pipelines are told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import afa
from afa.ensemble.caching.settings import EXACT, PRESETS, acceleration_of
from tests.refusal import refusal
from tests.tiny import tiny_pipeline

PROMPT = "a fox on the left and a pizza on the right, blue background"


@pytest.mark.parametrize(
    ("settings", "number", "said"),
    [
        ({"interval": 0}, "012", ["acceleration.interval", "from 1 to 1000", "got 0", "is 1"]),
        ({"fresh": -1}, "012", ["acceleration.fresh", "from 0 to 1000", "got -1"]),
        ({"drift": 0.1}, "014", ["acceleration.drift", "interval = 1"]),
        ({"interval": 2, "drift": -1}, "013", ["acceleration.drift", "got -1"]),
        ({"interval": 2, "order": 1}, "016", ["acceleration.order", "got 1"]),
        ({"guidance_until": 0.7}, "016", ["acceleration.guidance_until", "got 0.7", "drift"]),
        ({"interval": 2, "threshold": 0.1}, "016", ["acceleration.threshold", "got 0.1", "drift"]),
        ({"speed": 3}, "017", ["'speed'", "interval, fresh"]),
        ("faster", "015", ["exact, balanced, fast", "'faster'"]),
    ],
    ids=str,
)
def test_what_cannot_be(settings: Any, number: str, said: list[str]) -> None:
    with refusal(f"AFA-ENSEMBLE-{number}", *map(re.escape, said)):
        acceleration_of(settings)


def test_settings_from_names_and_from_some_of_them() -> None:
    assert acceleration_of("exact") is EXACT
    assert acceleration_of({"interval": 3}) == afa.Acceleration(interval=3)
    assert acceleration_of(PRESETS["fast"]) is PRESETS["fast"]
    assert afa.Acceleration(interval=3).describe() == {"interval": 3}
    assert EXACT.is_exact
    assert not EXACT.describe()
    assert not any(PRESETS[name].is_exact for name in ("balanced", "fast"))


def test_a_removed_setting_that_changed_nothing_is_accepted() -> None:
    saved = {"interval": 3, "order": 0, "threshold": None, "guidance_until": 1.0}
    assert acceleration_of(saved) == afa.Acceleration(interval=3)


def draw(pipeline: Any, num_steps: int = 5, **settings: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": num_steps, "output_type": "np", **settings}
    return pipeline(PROMPT, generator=generator, **options).images[0]


def test_a_single_model_is_sped_up_likewise(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path)
    exact = draw(pipeline)
    assert afa.accelerate(pipeline, "exact") is pipeline
    fast = afa.accelerate(pipeline, {"interval": 2})
    assert type(fast) is type(pipeline)
    assert fast.vae is pipeline.vae
    assert not np.array_equal(draw(fast), exact)
    assert np.array_equal(draw(pipeline), exact)  # the one that was given is what it was
    same = afa.accelerate(fast, "exact")
    assert same is fast
    assert np.array_equal(draw(same), exact)  # in the ensemble's shell, bit for bit


def test_an_ensemble_is_changed_in_place() -> None:
    pipeline = afa.load_ensemble("zoo:ensemble")
    exact = draw(pipeline, 12, guidance_scale=3)
    assert afa.accelerate(pipeline, "fast") is pipeline
    assert pipeline.unet.acceleration == PRESETS["fast"]
    fast = draw(pipeline, 12, guidance_scale=3)
    assert not np.array_equal(fast, exact)
    assert np.array_equal(draw(pipeline, 12, guidance_scale=3), fast)  # nothing of the last picture
    image = torch.rand(1, 3, 64, 64)
    changed = StableDiffusionImg2ImgPipeline(**pipeline.components)
    draw(changed, 12, image=image, strength=0.8)  # shorter loops work likewise
    afa.accelerate(pipeline, "exact")
    assert np.array_equal(draw(pipeline, 12, guidance_scale=3), exact)


@pytest.mark.parametrize("together", [True, False])
def test_a_picture_does_not_depend_on_the_others_of_its_batch(together: bool) -> None:
    settled = {"interval": 3, "keep_weights": True}  # by drift, the batch decides as one
    pipeline = afa.accelerate(afa.load_ensemble("zoo:ensemble"), settled)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [PROMPT, PROMPT.replace("blue", "green")]
    settings = {"num_inference_steps": 4, "guidance_scale": 3, "output_type": "np"}

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipeline(prompts, generator=generators(0, 1), **settings).images
    alone = pipeline(prompts[:1], generator=generators(0), **settings).images
    if together:
        np.testing.assert_allclose(both[0], alone[0], atol=1e-4)
    else:
        assert not np.allclose(both[1], alone[0], atol=1e-2)
