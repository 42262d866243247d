"""Pictures carry their recipe and come out again bit for bit; what strangers write is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

import afa
from afa.denoisers.kinds import denoiser_of
from afa.drawing.pictures import draw, identity_of, on_every_call, prepare, prepare_again
from afa.drawing.recorded import (
    PictureRecipe,
    hash_pixels,
    picture_recipe,
    read_picture,
    save_picture,
)
from tests.refusal import refusal

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SAMPLING = {"seed": 3, "steps": 12, "guidance": 3.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return prepare("zoo:ensemble")


@pytest.fixture
def recipe(pipeline: Any) -> PictureRecipe:
    identity = identity_of(denoiser_of(pipeline))
    prompt = "a fox on the left and a pizza on the right, blue background"
    return picture_recipe(ensemble="zoo:ensemble", identity=identity, prompt=prompt, **SAMPLING)


def write(path: Path, text: object) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("afa", text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": {"animals": {"up": 1.5}}},
        {"acceleration": {"interval": 3, "keep_weights": True}},
        {"prompt": "狐狸 🦊 à gauche", "negative_prompt": "rouge"},
        {
            "prompt": "a (fox:1.4) on the left BREAK " + "a [pizza] on the right, " * 5,
            "negative_prompt": "(red:1.2)",
            "prompt_syntax": "weighted",
            "acceleration": {"interval": 3, "keep_weights": True},
            "bias": {"animals": {"up": 1.5}},
        },
    ],
)
def test_a_picture_comes_out_again(
    recipe: PictureRecipe, changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = picture_recipe(**{**dict(recipe), **changes})
    first = draw(prepare_again(recipe), recipe)
    path = tmp_path / "picture.png"
    save_picture(first, path, recipe, CPU)
    said = read_picture(path)
    assert said.recipe == recipe
    assert said.pixels == hash_pixels(first) == hash_pixels(Image.open(path))
    again = draw(prepare_again(said.recipe), said.recipe)
    assert again.tobytes() == first.tobytes()


@pytest.mark.nightly
def test_every_setting_is_another_picture(pipeline: Any, recipe: PictureRecipe) -> None:
    changes: list[dict[str, Any]] = [
        *({}, {"seed": 4}, {"steps": 5}, {"guidance": 2.0}, {"width": 72}),
        *({"prompt": "a bee"}, {"negative_prompt": "a fox"}),
        *({"bias": {"food": {"down": 2.0}}}, {"acceleration": {"interval": 3}}),
    ]
    drawn = set()
    for change in changes:
        other = picture_recipe(**{**dict(recipe), "steps": 4, **change})
        drawn.add(hash_pixels(draw(prepare_again(other), other)))
    assert len(drawn) == len(changes)


def test_the_identity_is_of_experts_and_aggregators(pipeline: Any) -> None:
    denoiser = denoiser_of(pipeline)
    identity = identity_of(denoiser)
    assert identity == identity_of(denoiser_of(prepare("zoo:ensemble", torch_dtype=torch.bfloat16)))
    parameter = denoiser.aggregators[3].conv_out.weight
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter[0, 0] += 1
        assert identity_of(denoiser) != identity
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert identity_of(denoiser) == identity


def test_another_ensemble_is_refused(recipe: PictureRecipe, tmp_path: Path) -> None:
    other = recipe.model_copy(update={"identity": "0" * 64})
    with refusal("AFA-DRAW-005"):
        prepare_again(other)
    gone = recipe.model_copy(update={"ensemble": str(tmp_path / "gone")})
    with refusal("AFA-DRAW-004", "gone"):
        prepare_again(gone)


def test_calls_are_counted_and_can_be_stopped(pipeline: Any, recipe: PictureRecipe) -> None:
    whole = draw(pipeline, recipe)
    seen: list[int] = []

    def stop(call: int) -> None:
        seen.append(call)
        if call == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError), on_every_call(pipeline, stop):
        draw(pipeline, recipe)
    assert seen == [0, 1, 2, 3, 4]
    assert draw(pipeline, recipe).tobytes() == whole.tobytes()
    assert seen == [0, 1, 2, 3, 4]


# -- what others write in ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "strange.png"),
        ("[" * 200_000, "strange.png"),
        ([], "strange.png"),
        ({"recipe": {}}, "'recipe.ensemble': Field required"),
        ({"format": "afa-picture", "version": 2}, "'version'"),
        ('{"x": "' + "a" * 1_100_000 + '"}', "."),
    ],
)
def test_strange_texts_are_one_line(text: object, words: str, tmp_path: Path) -> None:
    with refusal("AFA-DRAW-008", words) as caught:
        read_picture(write(tmp_path / "strange.png", text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": -1}, {"seed": 2**40}, {"steps": 0}, {"steps": 10**9}, {"height": 10**6}),
        *({"guidance": float("inf")}, {"prompt": "a" * 30_000}, {"dtype": "int4"}, {"code": "x"}),
        *({"bias": {"animals": 1.0}}, {"bias": {"animals": {"up": "much"}}}),
        *({"plan": "plan.json"}, {"quantize": "int2"}),
    ],
)
def test_values_that_cannot_be_are_refused(recipe: PictureRecipe, change: dict[str, Any]) -> None:
    name = next(iter(change))
    with refusal("AFA-DRAW-002", f"{name}"):
        picture_recipe(**{**dict(recipe), **change})


def test_other_files_are_refused(recipe: PictureRecipe, tmp_path: Path) -> None:
    plain, jpeg, text = (tmp_path / name for name in ("plain.png", "picture.jpg", "text.png"))
    Image.new("RGB", (8, 8)).save(plain)
    Image.new("RGB", (8, 8)).save(jpeg)
    text.write_text("a fox")
    for path, code in {
        plain: "AFA-DRAW-007",
        jpeg: "AFA-DRAW-006",
        text: "AFA-DRAW-006",
        tmp_path / "none.png": "AFA-DRAW-006",
    }.items():
        with refusal(code, path.name):
            read_picture(path)


def test_reading_makes_no_pixels(recipe: PictureRecipe, tmp_path: Path) -> None:
    """A picture that would take gigabytes says what it was made from all the same."""
    path = tmp_path / "picture.png"
    save_picture(Image.new("RGB", (8, 8)), path, recipe, CPU)
    content = path.read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(content[: content.index(b"IDAT") + 8])
    assert read_picture(cut).recipe == recipe


def test_it_works_on_an_ensemble_made_in_memory() -> None:
    experts = [f"zoo:{name}" for name in ("animals", "food")]
    pipeline = afa.load_pipeline(experts, afa.SABWConfig(hidden_size=32, norm_num_groups=8))
    assert len(identity_of(denoiser_of(pipeline))) == 64
