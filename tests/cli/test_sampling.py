"""`afa generate` as people sample: schedulers, pictures from pictures, files of prompts, A1111."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, PngImagePlugin

from tests.cli.test_cli import fails, run, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

Generate = Any


@pytest.fixture(scope="module")
def ensemble(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", write_recipe(folder, experts), "--output", folder / "ensemble") == 0
    return folder / "ensemble"


@pytest.fixture
def generate(ensemble: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Draw into a folder; returns the recorded recipes by file name."""

    def drawn(name: str, *arguments: object) -> dict[str, Any]:
        command = ("generate", ensemble, *arguments, "--output", tmp_path / name)
        assert run(*command, "--no-check") == 0
        return recipes(tmp_path / name)

    return drawn


def recipes(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            if "afa" in picture.info:
                found[path.name] = json.loads(picture.info["afa"])["recipe"]
    return found


def again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first picture of a folder comes out again."""
    picture = next(path for path in sorted(folder.glob("*.png")) if "weights" not in path.name)
    capsys.readouterr()
    assert run("generate", "--from-image", picture, "--output", folder.with_suffix(".again")) == 0
    assert "identical, bit for bit" in capsys.readouterr().out


def test_a_scheduler_and_a_random_seed(
    generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 3, "--size", "24x16", "--scheduler", "DPM++ 2M SDE Karras")
    ((name, recipe),) = generate("new", "a fox", *options, "--seed", "random").items()
    assert recipe["scheduler"] == "dpmpp_2m_sde_karras"
    assert (recipe["width"], recipe["height"]) == (24, 16)
    assert f"seed {recipe['seed']}" in capsys.readouterr().out
    assert f"seed{recipe['seed']}" in name
    again(tmp_path / "new", capsys)


@pytest.mark.parametrize("scheduler", ["heun", "euler_a"])
def test_a_scheduler_beside_plan_bias_and_weights(
    scheduler: str, generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: list[object] = ["--steps", 3, "--scheduler", scheduler, "--bias", "1=+2", "--weights"]
    if scheduler == "euler_a":
        options += ["--speed", "fast"]
    (recipe,) = generate("new", "a fox", *options).values()
    assert (recipe["scheduler"], len(list((tmp_path / "new").iterdir()))) == (scheduler, 2)
    again(tmp_path / "new", capsys)


def test_pictures_from_pictures(
    generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((27, 19)).save(image)
    Image.new("L", (27, 19), "white").save(mask)
    (recipe,) = generate("i", "a fox", "--image", image, "--steps", 4, "--weights").values()
    assert (recipe["width"], recipe["height"]) == (26, 18)  # its own size, in steps of two
    assert "27 x 19" in capsys.readouterr().out
    assert recipe["image"]["path"] == str(image)
    again(tmp_path / "i", capsys)
    options = ("--image", image, "--mask", mask, "--strength", 0.5, "--steps", 4)
    (recipe,) = generate("m", "a fox", *options, "--scheduler", "heun", "--size", "16x16").values()
    assert (recipe["strength"], recipe["width"]) == (0.5, 16)
    again(tmp_path / "m", capsys)
    (recipe,) = generate("h", "a fox", "--hires", 1.5, "--steps", 4, "--weights").values()
    assert (recipe["hires"], recipe["height"]) == (1.5, 16)
    with Image.open(next((tmp_path / "h").glob("*seed0.png"))) as picture:
        assert picture.size == (24, 24)
        assert "Hires upscale: 1.5" in picture.info["parameters"]
    again(tmp_path / "h", capsys)
    Image.new("L", (27, 19)).save(image)
    drawn = next((tmp_path / "i").glob("*seed0.png"))
    line = fails(capsys, "generate", "--from-image", drawn, "--output", tmp_path / "no")
    assert "AFA-DRAW-034" in line


def test_a_file_of_prompts(generate: Generate, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "a fox --w 24 --h 16 --d 5 --s 3 --n a bee\n"
        '--prompt "a pizza" --steps 2 --sampler_name "Euler a" --cfg_scale 2\n'
        "a bee\n"
    )
    options = ("--prompts-file", file, "--steps", 4, "--num-images", 2)
    found = generate("new", *options)
    assert list(found) == [
        *("00-a-fox-seed5.png", "00-a-fox-seed6.png", "01-a-pizza-seed0.png"),
        *("01-a-pizza-seed1.png", "02-a-bee-seed0.png", "02-a-bee-seed1.png"),
    ]
    fox, pizza, bee = (found[name] for name in list(found)[::2])
    assert (fox["width"], fox["height"], fox["steps"]) == (24, 16, 3)
    assert fox["negative_prompt"] == "a bee"
    assert (pizza["steps"], pizza["scheduler"], pizza["guidance"]) == (2, "euler_a", 2)
    assert (bee["steps"], "scheduler" in bee) == (4, False)
    before = {path: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    next(iter(before)).unlink()
    generate("new", *options)  # goes on
    assert {path: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_a_picture_of_a1111(
    ensemble: Path, generate: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, info = tmp_path / "a1111.png", PngImagePlugin.PngInfo()
    text = (
        "a fox <lora:x:1>\nNegative prompt: a bee\nSteps: 3, Sampler: Euler a, CFG scale: 2, "
        "Seed: 11, Size: 24x16, Model: other, Clip skip: 2"
    )
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    (recipe,) = generate("new", "--from-image", path).values()
    said = capsys.readouterr().out
    for words in ("cannot be reproduced", "<lora:x:1>", "Clip skip: 2", "other"):
        assert words in said
    values = {"prompt": "a fox", "negative_prompt": "a bee", "steps": 3, "scheduler": "euler_a"}
    values |= {"guidance": 2, "seed": 11, "width": 24, "height": 16}
    assert {key: recipe[key] for key in values} == values
    again(tmp_path / "new", capsys)
    changed = ("--steps", 2, "--scheduler", "ddim", "--size", "16x16")
    (recipe,) = generate("other", "--from-image", path, *changed).values()
    assert (recipe["steps"], recipe["scheduler"], recipe["height"]) == (2, "ddim", 16)
    generate("lcm", "a fox", "--steps", 2, "--scheduler", "lcm", "--size", "16x16")
    assert "distilled for few steps" in capsys.readouterr().out
    for command, code in [
        ((), "AFA-CLI-040"),
        ((ensemble, "a bee"), "AFA-CLI-012"),
    ]:
        line = fails(capsys, "generate", *command, "--from-image", path, "--output", tmp_path / "x")
        assert code in line


@pytest.mark.parametrize(
    ("options", "code", "value"),
    [
        ("--seed x", "AFA-CLI-032", "x"),
        ("--size 16", "AFA-CLI-033", "16"),
        ("--size 16x16 --height 16", "AFA-CLI-034", "--height"),
        ("--prompts-file {file}", "AFA-CLI-036", "--prompts-file"),
        ("--mask {file}", "AFA-CLI-043", "--mask"),
        ("--strength 0.5", "AFA-CLI-043", "--strength"),
        ("--hires-strength 0.5", "AFA-CLI-043", "--hires-strength"),
        ("--hires 2 --image {file}", "AFA-CLI-044", "--hires"),
        ("--image {file}", "AFA-PICTURE-004", "file.png"),
        ("--hires 9", "AFA-DRAW-002", "hires"),
        ("--hires 1.5 --steps 1", "AFA-DRAW-029", "hires_strength"),
        ("--hires 1.05 --steps 4", "AFA-DRAW-029", "16 x 16"),
        ("--scheduler foo", "AFA-DRAW-020", "foo"),
        ("--scheduler heun --speed fast", "AFA-DRAW-028", "heun"),
        ("--scheduler euler --hires 1.5 --drafts {expert}", "AFA-DRAW-030", "--hires"),
    ],
)
def test_what_cannot_be(
    options: str,
    code: str,
    value: str,
    ensemble: Path,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file.png"
    file.write_text("no picture")
    given = options.format(file=file, expert=experts[0]).split()
    output = tmp_path / "new"
    line = fails(capsys, "generate", ensemble, "a fox", *given, "--output", output, "--no-check")
    assert code in line
    assert value in line
    assert not output.exists()
