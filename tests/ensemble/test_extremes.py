"""Sizes, batches, logits and prompts at the ends of what there is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.aggregators import Condition
from afa.aggregators.build import build_sabw
from afa.drawing.recorded import picture_recipe
from tests.cli.test_cli import run, write_recipe
from tests.refusal import refusal
from tests.tiny import inputs
from tests.training.runs import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline(experts: list[Path]) -> Any:
    pipeline = afa.load_pipeline(experts, SMALL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- latents ----------------------------------------------------------------------------------


@pytest.mark.fault(
    "odd sizes",
    "a step",
    how="latents of 1 x 1 to 8 x 33, sizes that are not multiples of 8",
    holds="bit for bit the result of the expert's own forward pass",
)
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (13, 8), (5, 24), (1, 1), (3, 2), (8, 33)])
def test_latents_of_any_size_are_what_one_expert_gives(
    size: tuple[int, int], experts: list[Path]
) -> None:
    """Not divisible by 8, nor by 2; the library's own forward pass takes these."""
    unet = afa.load_pipeline([experts[0]]).unet
    call = inputs(height=size[0], width=size[1])
    with torch.no_grad():
        ours, own = unet(**call)[0], unet.experts[0](**call)[0]
    assert torch.equal(ours, own)
    assert ours.shape[-2:] == size


@pytest.mark.parametrize("size", [(9, 7), (13, 8), (1, 1), (3, 2)])
def test_aggregators_take_them(size: tuple[int, int], pipeline: Any) -> None:
    call = inputs(height=size[0], width=size[1], text_width=48)
    with torch.no_grad():
        assert pipeline.unet(**call)[0].shape[-2:] == size


@pytest.mark.fault(
    "odd sizes",
    "a step",
    how="batch sizes 0, 1 and 5",
    holds="batches of 1 and 5 are computed; an empty batch is refused in one line",
)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches(batch: int, pipeline: Any) -> None:
    with torch.no_grad():
        call = inputs(batch=batch, text_width=48)
        if batch:
            assert len(pipeline.unet(**call)[0]) == batch
        else:
            with refusal("AFA-ENSEMBLE-027"):
                pipeline.unet(**call)


@pytest.mark.fault(
    "odd sizes",
    "a step",
    how="latents with a height or width of 0",
    holds="refused in one line",
)
@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_no_area(size: tuple[int, int], pipeline: Any) -> None:
    call = inputs(height=size[0], width=size[1], text_width=48)
    with refusal("AFA-ENSEMBLE-027"):
        pipeline.unet(**call)


# -- logits -----------------------------------------------------------------------------------


@pytest.mark.fault(
    "huge logits",
    "an aggregator",
    how="logits from 1e4 to values that overflow float32",
    holds="the weights sum to 1, or the step is refused; NaN is never passed on silently",
)
@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_huge_logits_choose_one_expert(size: float, pipeline: Any) -> None:
    rule: Any = build_sabw(
        afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4),
        pipeline.unet.sites[:1],
        3,
        16,
    )[0]
    site = pipeline.unet.sites[0]
    with torch.no_grad():
        rule.conv_out.weight.normal_().mul_(size)
        features = [torch.randn(2, site.channels, 4, 4) for _ in range(3)]
        text = torch.randn(2, 5, 16)
        temb = torch.randn(2, site.temb_channels)
        fused = rule(features, Condition(torch.ones(2), temb, text, torch.randn(2, 4, 4, 4)))
    if fused.weights.isfinite().all():
        assert torch.allclose(fused.weights.sum(1), torch.ones(2, 4, 4))
        assert fused.weights.max() == 1
    else:  # logits beyond float32: never quietly
        assert size > 1e37


@pytest.mark.parametrize("bias", [1e4, -1e30])
def test_a_huge_bias_leaves_one_expert(bias: float, pipeline: Any) -> None:
    afa.steer(pipeline, {"0": abs(bias)} if bias > 0 else {"1": bias, "2": bias})
    seen: list[torch.Tensor] = []
    pipeline.unet.on_weights = lambda _, name, weights: seen.append(weights)
    with torch.no_grad():
        assert pipeline.unet(**inputs(text_width=48))[0].isfinite().all()
    afa.steer(pipeline, None)
    pipeline.unet.on_weights = None
    assert all(torch.equal(w[:, 0], torch.ones_like(w[:, 0])) for w in seen)


@pytest.mark.parametrize("bias", [math.inf, -math.inf, math.nan])
def test_a_bias_that_is_no_number(bias: float, pipeline: Any) -> None:
    with refusal("AFA-ENSEMBLE-053"):
        afa.steer(pipeline, {"0": bias})


# -- prompts ----------------------------------------------------------------------------------

PROMPTS = {
    "none": "",
    "spaces": " \t\n ",
    "long": "a fox " * 1700,
    "one long word": "f" * 10_000,
    "Japanese": "左に狐、右にピザ、青い背景",
    "Arabic": "ثعلب على اليسار",
    "emoji": "🦊 👨‍👩‍👧‍👦 🏳️‍🌈",
    "combining": "e\u0301\u0301\u0301" * 50,
    "right to left override": "\u202efox\u202c",
    "NUL and controls": "a\x00fox\x1b[31m\x07",
    "not a character": "a \ufffe \uffff fox",
    "beyond the first plane": "\U0010ffff\U0001f98a",
    "braces and markup": "{fox} [bold] <|endoftext|> <|startoftext|>",
}


@pytest.fixture(scope="module")
def ensemble(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    assert run("train", write_recipe(folder, experts), "--output", folder / "run") == 0
    return folder / "run"


@pytest.mark.fault(
    "unusual prompts",
    "generate",
    how="an empty prompt, 10,000 characters, many scripts, control characters, markup",
    holds="a picture is drawn, and --from-image reproduces it",
)
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_any_kind(name: str, ensemble: Path, tmp_path: Path) -> None:
    """A picture comes out, and makes itself again from what it says of itself."""
    prompt = PROMPTS[name]
    common = ["generate", ensemble, "--output", tmp_path / "a", "--steps", "1"]
    assert run(*common, "--", prompt) == 0
    (picture,) = (tmp_path / "a").glob("*.png")
    again = ["--from-image", picture, "--output", tmp_path / "b"]
    assert run("generate", *again) == 0
    (other,) = (tmp_path / "b").glob("*.png")
    assert (
        afa.drawing.recorded.read_picture(other).pixels
        == afa.drawing.recorded.read_picture(picture).pixels
    )
    assert afa.drawing.recorded.read_picture(other).recipe.prompt == prompt


@pytest.mark.fault(
    "unusual prompts",
    "generate",
    how="bytes that are not valid text; 20,001 characters",
    holds="refused in one line",
)
@pytest.mark.parametrize("prompt", ["a \udcff fox", "x" * 20_001])
def test_prompts_that_are_none(
    prompt: str, ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no text, as a terminal may hand them on; and more than a picture keeps."""
    code = run("generate", ensemble, prompt, "--output", tmp_path / "a", "--steps", "1")
    said = capsys.readouterr().err
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "'prompt'" in said
    assert not (tmp_path / "a").exists()


def test_a_prompt_as_a_recipe_of_a_picture_has_it() -> None:
    fields = {"ensemble": "x", "identity": "x", "seed": 0, "steps": 1, "guidance": 1}
    made = picture_recipe(**fields, height=8, width=8, prompt=PROMPTS["emoji"])
    assert made.prompt == PROMPTS["emoji"]
