"""`afa check --sheet`: the pictures of a training with their crops and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from afa.preflight import sheet
from tests.cli.test_cli import AGGREGATOR, run

TRAINING = {"num_steps": 1, "batch_size": 2, "device": "cpu"}


def written(place: Path, experts: list[Path], **data: Any) -> Path:
    content = {
        "experts": [str(expert) for expert in experts[:2]],
        "aggregator": AGGREGATOR,
        "training": TRAINING,
        "data": data,
    }
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for n, size in enumerate([(32, 32), (96, 32), (8, 8), (32, 32)]):
        Image.new("RGB", size, (200, 60 * n, 40)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("a fox " * 40 if n == 1 else f"caption {n}")
    (folder / "3.png").write_bytes(b"broken")
    return folder


def test_a_sheet_shows_extremes_first(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures")
    recipe = written(tmp_path, experts, folder="./pictures", max_broken=1, crop="center")
    place = tmp_path / "sheet.png"
    assert run("check", recipe, "--no-weights", "--sheet", place) == 0
    out = capsys.readouterr().out
    assert "Sheet of 3 pictures" in out
    assert "cut off 22% on average, 67% at most" in out
    with Image.open(place) as shown:
        colours = [
            shown.getpixel((sheet._GAP + n * (sheet._SIDE + sheet._GAP) + sheet._SIDE // 2, 170))
            for n in range(3)
        ]
        dark = shown.getpixel((sheet._GAP + 20, 170))
    assert colours == [(200, 60, 40), (200, 120, 40), (200, 0, 40)]  # wide, tiny, other
    assert dark == (70, 21, 14)  # cut off by the crop
    first = place.read_bytes()
    assert run("check", recipe, "--no-weights", "--json", "--sheet", place) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data_details"]["pictures"] == 4
    assert place.read_bytes() == first


def test_a_sheet_of_scenes(experts: list[Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, experts, scenes={"num_samples": 3})
    assert run("check", recipe, "--no-weights", "--sheet", tmp_path / "sheet.png") == 0
    assert (tmp_path / "sheet.png").is_file()


def test_sheets_that_cannot_be_drawn(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures")
    streamed = written(tmp_path, experts, dataset={"path": "x", "streaming": True})
    assert run("check", streamed, "--sheet", tmp_path / "s.png") == 2
    assert "AFA-CLI-056" in capsys.readouterr().err
    assert run("check", "zoo:ensemble", "--sheet", tmp_path / "s.png") == 2
    assert "AFA-CLI-056" in capsys.readouterr().err
    recipe = written(tmp_path, experts, folder="./pictures")
    for place in ("sheet.jpg", "nowhere/sheet.png"):
        assert run("check", recipe, "--sheet", tmp_path / place) == 2
        assert "AFA-CLI-057" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
