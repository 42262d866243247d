"""One expert as it is named: by a text, a mapping, an `ExpertSource`, or in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import afa
from afa import AfaError, ExpertSource
from afa.recipe import Section, resolve_sources
from tests.refusal import refusal

LORA = {"base": "./base", "lora": "./ink.safetensors", "scale": 0.5, "sha256": "ab"}
DESCRIBED = {"model": "./a.safetensors", "config": None, "prediction_type": "v_prediction"}


class Recipe(Section):
    experts: list[ExpertSource]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name", ExpertSource("org/name")),
        (Path("a/b"), ExpertSource("a/b")),
        (ExpertSource("a", revision="v1"), ExpertSource("a", revision="v1")),
        (DESCRIBED, ExpertSource("./a.safetensors", prediction_type="v_prediction")),
        (
            LORA,
            ExpertSource("./base", lora="./ink.safetensors", scale=0.5, lora_sha256="ab"),
        ),
    ],
)
def test_every_way_to_name_one(given: Any, expected: ExpertSource) -> None:
    assert ExpertSource.of(given) == expected
    if not isinstance(given, Path):
        assert Recipe(experts=[given]).experts == [expected]


def test_a_recipe_is_written_as_it_was_read() -> None:
    written = ["org/name", DESCRIBED, {**LORA, "config": None, "prediction_type": None}]
    recipe = Recipe.model_validate({"experts": written})
    assert recipe.model_dump(mode="json") == recipe.model_dump() == {"experts": written}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"experts": ["./a", "zoo:food", LORA]})
    first, zoo, lora = resolve_sources(recipe, tmp_path, "experts").experts
    assert (first.source, zoo.source) == (str(tmp_path / "a"), "zoo:food")
    assert lora.source == str(tmp_path / "base")
    assert (lora.lora, lora.scale) == (str(tmp_path / "ink.safetensors"), 0.5)


@pytest.mark.parametrize("wrong", [{"model": "a"}, {"lora": "a"}, {**LORA, "scale": 11}, 5])
def test_wrong_ones_in_a_recipe(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({"experts": [wrong]})


@pytest.mark.parametrize(
    "wrong", [{"scale": 11.0}, {"scale": float("nan")}, {"prediction_type": "noise"}]
)
def test_wrong_ones_in_python(wrong: Any) -> None:
    with pytest.raises(AfaError, match="must be"):
        ExpertSource("a", **wrong)


def test_moved_experts_keep_what_is_known_of_them() -> None:
    saved = ExpertSource("./a", "v1", "ab", prediction_type="epsilon")
    assert saved.moved_to(saved) == saved
    assert saved.moved_to("./b") == ExpertSource("./b", "v1", "ab", prediction_type="epsilon")
    named = {"model": "./b", "prediction_type": "v_prediction"}
    moved = ExpertSource("./b", "v1", "ab", prediction_type="v_prediction")
    assert saved.moved_to(named) == moved


def test_hashes_that_are_demanded(experts: list[Path]) -> None:
    wrong = ExpertSource(str(experts[0]), sha256="0" * 64)
    with refusal("AFA-LOAD-082", "SHA-256", "0{64}"):
        afa.load_pipeline([wrong])
    with refusal("AFA-LOAD-082", "SHA-256", "0{64}"):
        afa.load_pipeline([experts[0]], vae=wrong)
    known = afa.load_pipeline([experts[0]]).unet.provenance
    right = ExpertSource(str(experts[0]), sha256=known.experts[0].sha256)
    own = ExpertSource(str(experts[0]), sha256=known.vae.sha256)
    assert afa.load_pipeline([right], vae=own).unet.provenance == known
