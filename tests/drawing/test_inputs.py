"""Pictures from pictures: as the stock pipelines draw them, recorded, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

import afa
from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.drafting import DraftsRecipe, use_drafts
from afa.drawing.inputs import fitted, hash_input, hires_size, taking_picture
from afa.drawing.pictures import draw, identity_of, prepare, prepare_again
from afa.drawing.recorded import picture_recipe, read_picture, save_picture
from afa.ensemble.recording import record_weights
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts

if TYPE_CHECKING:
    from pathlib import Path

    from afa.drawing.recorded import PictureRecipe

pytestmark = pytest.mark.slow

SAMPLING: dict[str, Any] = {"seed": 3, "steps": 4, "guidance": 3.0, "height": 16, "width": 16}


def picture(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def half_white(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


def given(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hash_input(path)}


def recipe(**changes: Any) -> PictureRecipe:
    fields = {"ensemble": "none", "identity": "none", "prompt": "a fox", **SAMPLING, **changes}
    return picture_recipe(**fields)


@pytest.mark.parametrize("masked", [False, True])
def test_it_draws_as_the_stock_pipeline(experts: list[Path], tmp_path: Path, masked: bool) -> None:
    image, mask = picture(tmp_path / "i.png"), half_white(tmp_path / "m.png")
    inside = afa.load_pipeline(experts[:1])
    alone: Any = StableDiffusionPipeline.from_pretrained(experts[0], safety_checker=None)
    alone.scheduler = EulerAncestralDiscreteScheduler.from_config(alone.scheduler.config)
    auto = AutoPipelineForInpainting if masked else AutoPipelineForImage2Image
    other: Any = auto.from_pipe(alone, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    opened: dict[str, Any] = {"image": Image.open(image)}
    if masked:
        opened |= {"mask_image": Image.open(mask), "height": 16, "width": 16}
    expected = other(
        "a fox",
        num_inference_steps=4,
        strength=0.6,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        **opened,
    ).images[0]
    masks = {"mask": given(mask)} if masked else {}
    asked = recipe(image=given(image), strength=0.6, scheduler="euler_a", **masks)
    drawn = draw(inside, asked)
    assert drawn.tobytes() == expected.tobytes()
    assert draw(inside, recipe(scheduler="euler_a")).tobytes() != drawn.tobytes()


def test_hires_is_a_second_pass(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts)
    first = draw(pipeline, recipe())
    both = draw(pipeline, recipe(hires=1.5, hires_strength=0.5))
    assert both.size == (24, 24)
    larger = tmp_path / "larger.png"
    first.resize((24, 24), Image.Resampling.LANCZOS).save(larger)
    size = {"height": 24, "width": 24}
    second = draw(pipeline, recipe(image=given(larger), strength=0.5, **size))
    assert both.tobytes() == second.tobytes()
    assert hires_size(16, 24, 1.3, 8) == (16, 24)


def test_a_picture_from_a_picture_comes_out_again(tmp_path: Path) -> None:
    image, mask = picture(tmp_path / "i.png", (70, 64)), half_white(tmp_path / "m.png", (70, 64))
    pipeline = prepare("zoo:ensemble")
    zoo: dict[str, Any] = {
        "ensemble": "zoo:ensemble",
        "identity": identity_of(denoiser_of(pipeline)),
    }
    zoo |= {"height": 64, "width": 64}
    asked = recipe(**zoo, image=given(image), scheduler="DPM++ 2M")
    assert (asked.scheduler, asked.strength, asked.num_calls) == ("dpmpp_2m", 0.8, 3)
    with record_weights(denoiser_of(pipeline)) as record:
        drawn = draw(pipeline, asked)
    assert len(record.steps) == 3
    path = tmp_path / "drawn.png"
    save_picture(drawn, path, asked, torch.device("cpu"))
    found = read_picture(path).recipe
    assert found == asked
    assert draw(prepare_again(found), found).tobytes() == drawn.tobytes()
    with refusal("AFA-DRAW-032", "StableDiffusionInpaintPipeline", "not 8"):  # latent channels
        draw(pipeline, recipe(**zoo, image=given(image), mask=given(mask)))
    picture(image, (70, 64), seed=1)
    with refusal("AFA-DRAW-034", "i.png"):
        draw(pipeline, found)
    image.unlink()
    with pytest.raises(AfaError, match=r"i\.png"):
        draw(pipeline, found)


def test_drafts_have_the_scheduler_of_the_picture(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:2])
    judge = ExpertSource(str(experts[2]))
    use_drafts(pipeline, DraftsRecipe(judge=judge, num_steps=2, num_levels=2))
    seen = {draw(pipeline, recipe(scheduler=name)).tobytes() for name in (None, "euler_a", "heun")}
    again = draw(pipeline, recipe(scheduler="euler_a")).tobytes()
    assert len(seen) == len(seen | {again}) == 3
    image = picture(tmp_path / "i.png")
    for changes in ({"hires": 2}, {"image": given(image)}):
        with refusal("AFA-DRAW-030", "--no-drafts"):
            draw(pipeline, recipe(**changes))


def test_inputs_that_do_not_fit(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1])
    image, mask = picture(tmp_path / "i.png"), half_white(tmp_path / "m.png", (8, 16))
    with refusal("AFA-DRAW-031", "8 x 16", "16 x 16"):
        draw(pipeline, recipe(image=given(image), mask=given(mask)))
    Image.new("L", (16, 16)).save(mask)
    with refusal("AFA-DRAW-031", "black"):
        draw(pipeline, recipe(image=given(image), mask=given(mask)))
    Image.new("RGBA", (16, 16), (255, 255, 255, 10)).save(mask)
    with refusal("AFA-DRAW-031", "transparent"):
        draw(pipeline, recipe(image=given(image), mask=given(mask)))
    with refusal("AFA-DRAW-029", "4 steps", "0.2", "0.25"):
        draw(pipeline, recipe(image=given(image), strength=0.2))
    with refusal("AFA-DRAW-029", "--hires-strength"):
        draw(pipeline, recipe(hires=2, hires_strength=0.1))
    for wrong in ({"mask": given(mask)}, {"image": given(image), "hires": 2}, {"strength": 0}):
        with refusal("AFA-DRAW-002"):
            recipe(**wrong)


def test_a_picture_is_scaled_and_cropped() -> None:
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (10, 0, 30, 10))
    assert fitted(wide, (20, 20)).size == (20, 20)
    assert fitted(wide, (20, 20)).getcolors() == [(400, (0, 0, 255))]
    assert fitted(wide, (40, 10)) is wide


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "z-image", "qwen-image", "chroma"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts(kind, tmp_path, 2))
    image, mask = picture(tmp_path / "i.png"), half_white(tmp_path / "m.png")
    masks = kind in ("xl", "flux", "z-image", "qwen-image")  # tiny Stable Diffusion 3: 4 channels
    for options in [{}, {"mask": given(mask)}][: 1 + masks]:
        asked = recipe(image=given(image), strength=0.5, **options)
        drawn = draw(pipeline, asked)
        assert drawn.size == (16, 16)
        assert draw(pipeline, asked).tobytes() == drawn.tobytes()


@pytest.mark.parametrize(("kind", "masked"), [("pixart", False), ("chroma", True), ("klein", True)])
def test_families_without_such_a_pipeline(kind: str, masked: bool, tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts(kind, tmp_path, 1))
    with refusal("AFA-DRAW-033", kind_of_pipeline(pipeline).name):
        taking_picture(pipeline, masked=masked)
