"""The emoji scenes: pure functions of seed and index, exact captions, pairs kept apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from afa.training import SceneImages
from afa.training.data import open_data
from afa.training.recipe import DataRecipe, ScenesRecipe
from afa.zoo.models import MAX_TOKENS, build_tokenizer
from afa.zoo.scenes import (
    BACKGROUNDS,
    Kind,
    Scene,
    evaluation_prompts,
    is_held_out,
    pair_set,
    parse_caption,
    scene,
    scenes,
)
from afa.zoo.sprites import DOMAIN_OF, DOMAINS, OBJECTS, load_sprites
from tests.refusal import refusal


def test_a_scene_is_a_pure_function_of_its_arguments() -> None:
    assert scene(7, seed=1) == scene(7, seed=1)
    assert len({scene(n, seed=1) for n in range(50)}) > 45
    assert scene(7, seed=1) != scene(7, seed=2)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_domains_of_each_kind(kind: Kind) -> None:
    for shown in scenes(200, kind=kind):
        domains = {DOMAIN_OF[shown.left], DOMAIN_OF[shown.right]}
        assert shown.left != shown.right
        assert kind == "any" or (len(domains) == 2 if kind == "mixed" else domains == {kind})


def test_held_out_pairs_are_in_no_training_stream() -> None:
    for kind in get_args(Kind):
        assert not any(is_held_out(s.left, s.right) for s in scenes(1000, kind=kind))
    held_out = list(scenes(200, kind="mixed", held_out=True))
    assert all(is_held_out(s.left, s.right) and s.is_mixed for s in held_out)


def test_a_tenth_of_the_mixed_pairs_is_held_out_in_both_orders() -> None:
    mixed = [(a, b) for a in OBJECTS for b in OBJECTS if DOMAIN_OF[a] != DOMAIN_OF[b]]
    held_out = [pair for pair in mixed if is_held_out(*pair)]
    assert 0.08 < len(held_out) / len(mixed) < 0.12
    assert all(is_held_out(b, a) for a, b in held_out)


def test_own_domains_have_no_held_out_pairs() -> None:
    with refusal("AFA-ZOO-006"):
        scene(0, kind="animals", held_out=True)
    with refusal("AFA-ZOO-005"):
        scene(0, kind="cars")  # type: ignore[arg-type]


def test_objects_can_be_left_out() -> None:
    without = frozenset({"fox", "pizza"})
    shown = [scene(n, without=without) for n in range(300)]
    assert not without & {name for each in shown for name in (each.left, each.right)}
    assert scene(7, without=frozenset()) == scene(7)
    with refusal("AFA-ZOO-013", "unicorn"):
        scene(0, without=frozenset({"unicorn"}))
    with refusal("AFA-ZOO-014"):
        scene(0, kind="food", without=frozenset(name for name, _ in DOMAINS["food"][1:]))


def test_recipes_without_it_are_written_as_before() -> None:
    """So that a training that began before `without` existed can be resumed."""
    assert ScenesRecipe().model_dump() == {"num_samples": 10_000, "seed": 0, "kind": "any"}
    assert repr(SceneImages(5)) == "SceneImages(5, seed=0, kind='any')"
    assert "fifth" in repr(SceneImages(5, hold_out="fifth"))
    data = open_data(DataRecipe(scenes=ScenesRecipe(num_samples=500, hold_out="fifth")))
    assert isinstance(data, SceneImages)
    shown = [parse_caption(data.stored(n).caption) for n in range(500)]
    assert {pair_set(s.left, s.right) for s in shown} == {"training"}
    written = ScenesRecipe(without=["fox"]).model_dump(mode="json")
    assert written["without"] == ["fox"]
    assert ScenesRecipe.model_validate(written).without == ["fox"]


def test_a_caption_and_its_scene_are_the_same_thing() -> None:
    for shown in scenes(300):
        read = parse_caption(shown.caption)
        assert (read.left, read.right, read.background) == (
            shown.left,
            shown.right,
            shown.background,
        )


@pytest.mark.parametrize("caption", ["", "a fox", "a fox on the left and a fox on the right, x"])
def test_other_texts_are_no_captions(caption: str) -> None:
    with refusal("AFA-ZOO-004"):
        parse_caption(caption)


def test_a_picture_shows_what_its_caption_says() -> None:
    shown = Scene("fox", "pizza", "blue", ((0, 0), (2, -8)))
    picture = shown.render()
    assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
    assert tuple(picture[0, 0]) == BACKGROUNDS["blue"]
    sprite = load_sprites()["fox"]
    solid = sprite[..., 3] == 1
    window = picture[18:46, 2:30]
    assert np.allclose(window[solid], sprite[..., :3][solid] * 255, atol=1)
    assert not np.array_equal(picture, Scene("pizza", "fox", "blue").render())


def test_every_sprite_stays_in_its_half() -> None:
    for shown in scenes(100):
        left = replace(shown, left="bee" if shown.left == "whale" else "whale").render()
        right = replace(shown, right="bee" if shown.right == "whale" else "whale").render()
        assert np.array_equal(left[:, 32:], shown.render()[:, 32:])
        assert np.array_equal(right[:, :32], shown.render()[:, :32])
        assert not np.array_equal(left, right)


def test_all_sprites_are_there_and_different() -> None:
    sprites = load_sprites()
    assert set(sprites) == set(OBJECTS)
    assert len(OBJECTS) == 48 == sum(len(o) for o in DOMAINS.values())
    assert all(s.shape == (28, 28, 4) and s[..., 3].max() == 1 for s in sprites.values())
    assert len({s.tobytes() for s in sprites.values()}) == 48


def test_test_prompts_are_held_out_and_different() -> None:
    prompts = evaluation_prompts(200)
    assert len(set(prompts)) == 200
    read = [parse_caption(p) for p in prompts]
    assert all(is_held_out(s.left, s.right) for s in read)
    assert prompts[:50] == evaluation_prompts(50)
    with refusal("AFA-ZOO-008"):
        evaluation_prompts(100_000)


def test_the_vocabulary_knows_every_word(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for name in (*OBJECTS, *BACKGROUNDS):
        assert tokenizer.tokenize(name) == [f"{name}</w>"]
    caption = Scene("strawberry", "watermelon", "green").caption
    ids = tokenizer(caption)["input_ids"]
    assert len(ids) == 16 <= MAX_TOKENS
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").strip() == caption
    assert tokenizer.unk_token_id not in tokenizer("a zebra in Zürich?")["input_ids"][:-1]


def test_the_vocabulary_is_the_same_in_every_run(tmp_path: Path) -> None:
    first, second = build_tokenizer(tmp_path / "1"), build_tokenizer(tmp_path / "2")
    assert first.get_vocab() == second.get_vocab()
    assert (first.convert_tokens_to_ids("a</w>"), len(first)) == (320, 709)
