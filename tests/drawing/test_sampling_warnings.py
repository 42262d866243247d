"""Warnings of schedulers and sizes with which pictures are poor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from diffusers import DDIMScheduler

import afa
from afa.drawing import sampling_warnings as module
from afa.drawing.recorded import picture_recipe
from afa.drawing.sampling_warnings import sampling_warnings
from afa.loading.task import native_resolution

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline


@pytest.fixture(scope="module")
def pipeline(experts: list[Path]) -> DiffusionPipeline:
    return afa.load_pipeline(experts[:1])


def warned(pipeline: DiffusionPipeline, **changes: Any) -> list[str]:
    height, width = native_resolution(pipeline)
    fields = {"ensemble": "none", "identity": "none", "prompt": "a fox", "seed": 3, "steps": 12}
    fields |= {"guidance": 3.0, "height": height, "width": width, **changes}
    return sampling_warnings(pipeline, [picture_recipe(**fields)], size_advice="Set it.")


def test_zero_terminal_snr_leaves_few_steps_of_some_spacings(pipeline: DiffusionPipeline) -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipeline.scheduler = DDIMScheduler(**betas, prediction_type="v_prediction")
    assert not warned(pipeline, scheduler="dpmpp_2m_karras")
    pipeline.scheduler = DDIMScheduler(
        **betas, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    (line,) = warned(pipeline, scheduler="dpmpp_2m_karras")
    assert "dpmpp_2m_karras spends 7 of 12 steps" in line
    assert "Use the scheduler dpmpp_2m," in line
    assert not warned(pipeline, scheduler="dpmpp_2m")
    assert not warned(pipeline, scheduler="euler_sgm_uniform")
    assert not warned(pipeline, scheduler=None)


def test_schedulers_of_distilled_models(pipeline: DiffusionPipeline) -> None:
    pipeline.scheduler = DDIMScheduler()
    (line,) = warned(pipeline, scheduler="lcm")
    assert "distilled for few steps" in line


def test_sizes_far_from_the_experts_own(
    pipeline: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "native_resolution", lambda _: (512, 512))
    for height, width in ((512, 768), (768, 768), (1024, 512), (256, 256)):
        assert not warned(pipeline, height=height, width=width)
    (line,) = warned(pipeline, height=1024, width=2048)
    assert "2048 x 1024 pixels are 8 times the area of the experts' own 512 x 512" in line
    assert line.endswith("(repeated objects). Set it.")
    (line,) = warned(pipeline, height=256, width=128)
    assert "0.12 times the area" in line
