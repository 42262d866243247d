"""A1111's text in pictures: written in its form, and read from its own pictures."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from afa.drawing.parameters import KEY, parse_parameters, read_parameters
from afa.drawing.recorded import (
    PictureRecipe,
    has_recipe,
    parameters_text,
    picture_recipe,
    save_picture,
)
from afa.provenance import __version__
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

#: what A1111 1.10 writes
A1111 = """masterpiece, (fox:1.3), snow <lora:ink:0.8>, <hypernet:x:1>
Negative prompt: blurry, [bad]
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, \
Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, \
Lora hashes: "ink: 3fa1b2, wash: 11", Hires upscaler: R-ESRGAN, Version: v1.10.1"""


def recipe(**changes: Any) -> PictureRecipe:
    fields: dict[str, Any] = {"ensemble": "./runs/first", "identity": "ab" * 32, "prompt": "a fox"}
    fields |= {"seed": 7, "steps": 20, "guidance": 7.5, "height": 64, "width": 96}
    return picture_recipe(**{**fields, **changes})


def test_what_is_written() -> None:
    text = parameters_text(recipe(scheduler="dpmpp_2m_karras", negative_prompt="a bee"))
    assert text.split("\n") == [
        "a fox",
        "Negative prompt: a bee",
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 7, Size: 96x64, Model hash: "
        f"ababababab, Model: first, Version: afa {__version__}",
    ]
    hires = parameters_text(recipe(hires=1.5, ensemble="./a, b: c"), "euler_a")
    assert "Sampler: Euler a," in hires
    assert 'Model: "a, b: c", Denoising strength: 0.5, Hires upscale: 1.5,' in hires
    assert "Sampler: EDMEuler," in parameters_text(recipe(), "EDMEuler")


@pytest.mark.parametrize("prompt", ["a fox, a bee: both", "two\nlines", "狐狸 🦊", "a fox\nx: 1"])
def test_what_is_written_is_read(prompt: str, tmp_path: Path) -> None:
    path, asked = tmp_path / "picture.png", recipe(prompt=prompt, scheduler="unipc", guidance=0.5)
    save_picture(Image.new("RGB", (8, 8)), path, asked, torch.device("cpu"))
    assert has_recipe(path)
    found = read_parameters(path)
    assert found is not None
    assert (found.prompt, found.sampler, found.negative_prompt) == (prompt, "UniPC", "")
    assert found.given == {
        "negative_prompt": "",
        **{name: getattr(asked, name) for name in ("steps", "guidance", "seed", "width", "height")},
    }


def test_a_picture_of_a1111(tmp_path: Path) -> None:
    path = tmp_path / "a1111.png"
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, A1111)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    assert not has_recipe(path)
    found = read_parameters(path)
    assert found is not None
    assert found.prompt == "masterpiece, (fox:1.3), snow"
    assert found.sampler == "DPM++ 2M Karras"
    assert found.given == {
        "negative_prompt": "blurry, [bad]",
        "steps": 25,
        "guidance": 6.5,
        "seed": 1234567890,
        "width": 512,
        "height": 768,
    }
    notes = "\n".join(found.notes)
    for said in ("v1-5-pruned", "<lora:ink:0.8>", "<hypernet:x:1>", "(word:1.3)", "[word]"):
        assert said in notes
    for said in ("Clip skip: 2", "Lora hashes: ink: 3fa1b2, wash: 11", "Hires upscaler: R-ESRGAN"):
        assert said in notes


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_the_text_in_exif(suffix: str, tmp_path: Path) -> None:
    path, exif = tmp_path / f"a1111.{suffix}", Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + f"狐狸{A1111}".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    found = read_parameters(path)
    assert found is not None
    assert found.prompt.startswith("狐狸masterpiece")
    assert found.seed == 1234567890


def test_other_texts_and_files(tmp_path: Path) -> None:
    found = parse_parameters("a fox\nSteps: 20", "x")  # too few pairs: a part of the prompt
    assert (found.prompt, found.steps) == ("a fox\nSteps: 20", None)
    automatic = "a\nSteps: 2, Sampler: {}, Schedule type: Automatic, Seed: 1"
    assert parse_parameters(automatic.format("DPM++ 2M"), "x").sampler == "DPM++ 2M Karras"
    assert parse_parameters(automatic.format("Euler a"), "x").sampler == "Euler a"
    with refusal("AFA-CLI-041", "Size: huge", "'x'"):
        parse_parameters("a\nSteps: 2, Seed: 1, Size: huge", "x")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "text.png", "gone.png"):
        assert read_parameters(tmp_path / name) is None
        assert not has_recipe(tmp_path / name)
    assert re.search(r"\\\(", "".join(parse_parameters(r"a \(b\)", "x").notes))
