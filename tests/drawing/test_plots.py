"""Figures: what they show is what they are given, as PNG and as SVG that needs no font."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from afa.drawing.plots import (
    comparison,
    expert_colours,
    filmstrip,
    heat_map,
    mix_colours,
    overlay,
    tint,
)
from afa.ensemble.recording import RecordedStep, WeightRecord
from tests.refusal import refusal

EXPERTS = ["$a_1$", "b", "c"]


def record(num_steps: int = 4, batch: int = 2) -> WeightRecord:
    """Expert 0 has the left half, expert 1 the right."""
    weights = torch.zeros(batch, 3, 8, 8)
    weights[:, 0, :, :4] = weights[:, 1, :, 4:] = 1
    steps = [RecordedStep(900 - n, {"conv_in": weights, "mid": weights}) for n in range(num_steps)]
    return WeightRecord(steps)


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]


def test_colours_are_mixed_by_weight() -> None:
    weights = record().mean_map(0, 8)[-1]
    colours = expert_colours(3)
    mixed = mix_colours(weights)
    torch.testing.assert_close(mixed[0, 0], colours[0])
    torch.testing.assert_close(mixed[0, 7], colours[1])
    even = mix_colours(torch.full((3, 2, 2), 1 / 3))
    torch.testing.assert_close(even[0, 0], colours.mean(0))
    assert len({tuple(colour.tolist()) for colour in expert_colours(7)}) == 7


def test_a_tint_is_between_the_picture_in_grey_and_the_colours() -> None:
    picture = Image.new("RGB", (16, 12), (200, 200, 200))
    weights = record().mean_map(0, 8)[-1]
    assert tint(picture, weights, strength=0).getextrema() == ((200, 200),) * 3
    whole = tint(picture, weights, strength=1)
    assert whole.size == picture.size
    expected = tuple((expert_colours(3)[0] * 255).round().int().tolist())
    assert whole.getpixel((0, 0)) == expected


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_figure_is_drawn(suffix: str, tmp_path: Path, pictures: Any) -> None:
    recorded, weights = record(), record().mean_map(None, 16)[-1]
    paths = [tmp_path / f"{name}.{suffix}" for name in ("heat", "over", "film", "side")]
    shares = recorded.mean_share()
    heat_map(shares, paths[0], experts=EXPERTS, sites=["conv_in", "mid"], title="a $5 fox 狐")
    overlay(pictures[0], weights, paths[1], experts=EXPERTS, title="a fox")
    filmstrip(recorded, pictures, paths[2], experts=EXPERTS, titles=["one", "two"])
    comparison({"$x$": pictures, "y": pictures}, ["a fox", "a $5 bee"], paths[3], bold=["y"])
    for path in paths:
        content = path.read_bytes()
        if suffix == "svg":
            assert content.startswith(b"<?xml")
            assert b"<text" not in content  # letters are outlines
            assert b"font-family" not in content
        else:
            with Image.open(path) as drawn:
                assert min(drawn.size) > 100
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_one_expert_that_leads_everywhere_and_one_step(tmp_path: Path, pictures: Any) -> None:
    weights = torch.zeros(2, 4, 4)
    weights[0] = 1
    overlay(pictures[0], weights, tmp_path / "a.png", experts=["a", "b"])
    alone = WeightRecord([RecordedStep(1, {"conv_out": torch.ones(1, 1, 4, 4)})])
    filmstrip(alone, pictures[:1], tmp_path / "b.png", experts=["a"])
    heat_map(alone.mean_share(), tmp_path / "c.png", experts=["a"], sites=["conv_out"])


def test_what_does_not_fit_is_refused(tmp_path: Path, pictures: Any) -> None:
    with refusal("AFA-DRAW-010"):
        filmstrip(WeightRecord(), pictures, tmp_path / "a.png", experts=EXPERTS)
    with refusal("AFA-DRAW-010"):
        filmstrip(record(batch=1), pictures, tmp_path / "a.png", experts=EXPERTS)
    with refusal("AFA-DRAW-009", "1", "3", r"\[4, 2, 3\]"):
        heat_map(record().mean_share(), tmp_path / "a.png", experts=EXPERTS, sites=["mid"])
    with refusal("AFA-DRAW-011", "2"):
        comparison({"x": pictures[:1]}, ["a", "b"], tmp_path / "a.png")
    with refusal("AFA-DRAW-011"):
        comparison({}, [], tmp_path / "a.png")
    with refusal("AFA-DRAW-012", r"'a\.gif'"):
        overlay(pictures[0], torch.ones(1, 4, 4), tmp_path / "a.gif", experts=["a"])
    assert list(tmp_path.iterdir()) == []
