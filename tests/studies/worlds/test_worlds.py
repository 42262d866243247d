"""Worlds: what each model knows, prompts that no training shows, and a build in few steps."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from afa.cli import main
from afa.studies.worlds.build import WorldShop, build_world
from afa.studies.worlds.pack import pack_world, unpack_world
from afa.studies.worlds.prompts import (
    KNOWN,
    MIXED,
    ONE_PRIVATE,
    PRIVATE,
    groups_of,
    prompts_of,
)
from afa.studies.worlds.recipe import BASE, POOLED, TEXT, WIDE, WORLDS, WorldRecipe, read_world
from afa.studies.worlds.text import cross_entropy, describes, named
from afa.zoo.scenes import Scene, pair_set, parse_caption
from afa.zoo.sprites import DOMAINS, OBJECTS, load_sprites
from benchmarks import unseen_prompts
from tests.refusal import refusal

SMALL: dict[str, Any] = {
    "num_scenes": 8,
    "text_steps": 2,
    "base_steps": 2,
    "expert_steps": 2,
    "batch_size": 2,
}


def pairs(captions: list[str]) -> set[tuple[str, str]]:
    scenes = [parse_caption(caption) for caption in captions]
    return {(scene.left, scene.right) for scene in scenes}


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_every_object_has_one_expert(count: Any) -> None:
    experts = WorldRecipe(num_experts=count).experts
    assert len(experts) == count
    assert sorted(itertools.chain(*experts.values())) == sorted(OBJECTS)
    sizes = {len(each) for each in experts.values()}
    assert sizes == {48 // count}
    for name, known in experts.items():
        shares = [sum(name in known for name, _ in each) for each in DOMAINS.values()]
        assert count == 3 or len(set(shares)) == 1, (name, shares)


def test_private_objects_are_those_of_their_expert_alone(tmp_path: Path) -> None:
    recipe = WorldRecipe(private=4)
    assert len(recipe.private_objects) == 12
    shop = WorldShop(tmp_path, recipe, load_sprites(), None)
    shown = {
        name: {obj for n in range(2000) for s in [shop.scene(n, name)] for obj in (s.left, s.right)}
        for name in (BASE, *recipe.experts)
    }
    assert shown[BASE] == set(OBJECTS) - recipe.private_objects
    for name, known in recipe.experts.items():
        assert shown[name] == set(known)
    with pytest.raises(ValidationError, match="3 experts"):
        WorldRecipe(private=4, num_experts=4)


@pytest.mark.parametrize("name", [BASE, "animals", "part-2"])
def test_no_model_sees_pairs_that_are_held_out(name: str, tmp_path: Path) -> None:
    recipe = WorldRecipe(num_experts=2 if name == "part-2" else 3)
    shop = WorldShop(tmp_path, recipe, load_sprites(), None)
    scenes = [shop.scene(n, name) for n in range(1000)]
    assert {pair_set(s.left, s.right) for s in scenes} == {"training"}


@pytest.mark.parametrize("world", ["main", "private", "split-4"])
def test_no_pair_is_in_two_sets(world: str) -> None:
    recipe = WORLDS[world]
    sets = {used: prompts_of(recipe, used, 10_000) for used in ("tuning", "development", "test")}
    for one, other in itertools.combinations(sets.values(), 2):
        for group in groups_of(recipe):
            assert one[group]
            swapped = {(b, a) for a, b in pairs(one[group])}
            assert not (pairs(one[group]) | swapped) & pairs(other[group])
    for expert in recipe.experts:
        own = pairs([caption for each in sets.values() for caption in each[expert]])
        assert {pair_set(*pair) for pair in own} == {"training"}
    assert prompts_of(recipe, "test", 5) == prompts_of(recipe, "test", 5)
    assert all(len(each) == 5 for each in prompts_of(recipe, "test", 5).values())


@pytest.mark.parametrize("world", [w for w in WORLDS if not w.startswith("after")])
def test_no_test_pair_was_judged_before(world: str) -> None:
    """Neither by the benchmark of unseen objects, nor when settings were chosen in any world."""
    tested = {
        pair for each in prompts_of(WORLDS[world], "test", 10_000).values() for pair in pairs(each)
    }
    before = [prompts_of(WORLDS["main"], used, 10_000) for used in ("tuning", "development")] + [
        unseen_prompts.prompts_of(choice, 10_000) for choice in unseen_prompts.CHOICES
    ]
    for prompts in before:
        for captions in prompts.values():
            judged = pairs(captions)
            assert not tested & (judged | {(b, a) for a, b in judged})


def test_the_groups_of_prompts() -> None:
    recipe = WORLDS["private"]
    found = prompts_of(recipe, "test", 10_000)
    for group, count in ((KNOWN, 0), (ONE_PRIVATE, 1), (PRIVATE, 2)):
        for left, right in pairs(found[group]):
            assert recipe.owner(left) != recipe.owner(right)
            assert len(recipe.private_objects & {left, right}) == count
    for left, right in pairs(found[KNOWN]):
        assert pair_set(left, right) == "test"
    for expert, known in recipe.experts.items():
        assert {name for pair in pairs(found[expert]) for name in pair} == set(known)
    mixed = pairs(prompts_of(WORLDS["main"], "test", 10_000)[MIXED])
    assert len({frozenset(pair) for pair in mixed}) == 65
    assert {pair_set(*pair) for pair in mixed} == {"test"}


@pytest.mark.nightly
def test_a_world_in_few_steps(tmp_path: Path) -> None:
    recipe = WorldRecipe(**SMALL, pooled_steps=2, is_wide=True, num_graded=2)
    names = [event.name.split(":")[0] for event in build_world(tmp_path / "one", recipe, 1)]
    models = [*recipe.experts, POOLED, WIDE]
    assert list(dict.fromkeys(names)) == [
        *(BASE, *models),
        *(f"scores of {name}" for name in (BASE, *models)),
    ]
    files = ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    encoders, denoisers = (
        {name: load_file(tmp_path / "one" / name / file) for name in (BASE, *models)}
        for file in files
    )
    for name in models:
        assert all(torch.equal(each, encoders[BASE][k]) for k, each in encoders[name].items())
    count = {name: sum(t.numel() for t in each.values()) for name, each in denoisers.items()}
    assert 2.8 < count[WIDE] / count[BASE] < 3.2
    weights = [each["conv_in.weight"] for name, each in denoisers.items() if name != WIDE]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    assert not list(build_world(tmp_path / "one", recipe, 1)), "all is done"
    with refusal("AFA-STUDY-008", "recipe.json"):
        next(build_world(tmp_path / "one", WorldRecipe(**SMALL), 1))

    assert pack_world(tmp_path / "one", tmp_path / "pack") == [BASE, *recipe.experts]
    size = sum(file.stat().st_size for file in (tmp_path / "pack").rglob("*.safetensors"))
    full = [denoisers[name] for name in (BASE, *recipe.experts)]
    assert size < 2.1 * sum(t.numel() for each in full for t in each.values()) + 1_000_000
    names = [e.name for e in build_world(tmp_path / "again", recipe, 1, tmp_path / "pack")]
    assert not {name.split(":")[0] for name in names} & {BASE, *recipe.experts, "scores of base"}
    for name in (BASE, *recipe.experts):
        for file in (tmp_path / "one" / name).rglob("*.safetensors"):
            copy = tmp_path / "again" / file.relative_to(tmp_path / "one")
            assert copy.read_bytes() == file.read_bytes(), file
    for name in (POOLED, WIDE):
        again = load_file(tmp_path / "again" / name / files[1])
        assert all(torch.equal(each, denoisers[name][key]) for key, each in again.items())
    reports = [(tmp_path / name / "report.json").read_bytes() for name in ("one", "again")]
    assert reports[0] == reports[1]
    with refusal("AFA-STUDY-008", "differs"):
        next(build_world(tmp_path / "new", WorldRecipe(**SMALL), 1, tmp_path / "pack"))
    with refusal("AFA-STUDY-028", "nothing"):
        next(build_world(tmp_path / "new", WorldRecipe(**SMALL), 1, tmp_path / "nothing"))
    with pytest.raises(SystemExit) as left:
        main(["zoo", "unpack", str(tmp_path / "pack"), str(tmp_path / "u")])
    assert not left.value.code
    again = load_file(tmp_path / "u" / "food" / files[1])
    assert all(torch.equal(each, denoisers["food"][key]) for key, each in again.items())
    record = json.loads((tmp_path / "u" / "recipe.json").read_text())
    assert WorldRecipe.model_validate(record) == recipe
    (tmp_path / "mixed" / BASE).mkdir(parents=True)
    for part in files:
        (tmp_path / "mixed" / BASE / part).parent.mkdir()
        shutil.copy(tmp_path / "one" / "food" / part, tmp_path / "mixed" / BASE / part)
    with refusal("AFA-STUDY-033", "mixed", "new folder"):
        unpack_world(tmp_path / "pack", tmp_path / "mixed")
    (tmp_path / "mixed" / "recipe.json").write_text('{"family": "dit"}')
    with refusal("AFA-RECIPE-002", "recipe.json"):
        pack_world(tmp_path / "mixed", tmp_path / "packed")
    shutil.copy(tmp_path / "one" / "recipe.json", tmp_path / "mixed")
    moved = {key: each + 1e-6 for key, each in denoisers[BASE].items()}
    save_file(moved, tmp_path / "mixed" / BASE / files[1])
    with refusal("AFA-STUDY-032", "not rounded"):
        pack_world(tmp_path / "mixed", tmp_path / "packed")
    with refusal("AFA-STUDY-027", "no base"):
        pack_world(tmp_path / "nothing", tmp_path / "packed")

    other = WorldRecipe(**SMALL, start=tmp_path / "one", num_experts=2, num_graded=1)
    list(build_world(tmp_path / "two", other, 2))
    base = load_file(tmp_path / "two" / BASE / files[1])
    assert all(torch.equal(each, denoisers[BASE][key]) for key, each in base.items())
    assert (tmp_path / "two" / "part-2" / "model_index.json").is_file()


def test_a_base_that_is_missing_or_another_one(tmp_path: Path) -> None:
    recipe = read_world("after-50", tmp_path / "after-50")
    assert recipe.start == tmp_path.resolve() / "main"
    with refusal("AFA-STUDY-013", "main"):
        next(build_world(tmp_path / "after-50", recipe, 1))
    (tmp_path / "main" / BASE).mkdir(parents=True)
    (tmp_path / "main" / BASE / "model_index.json").write_text("{}")
    (tmp_path / "main" / "recipe.json").write_text(WorldRecipe(seed=3).model_dump_json())
    with refusal("AFA-STUDY-014", "seed"):
        next(build_world(tmp_path / "after-50", recipe, 1))
    assert not (tmp_path / "after-50").exists()
    with refusal("AFA-STUDY-015", "nowhere", "after-50"):
        read_world("nowhere", tmp_path)
    (tmp_path / "mine.yaml").write_text("private: 2\nstart: main\n")
    assert read_world(str(tmp_path / "mine.yaml"), tmp_path / "mine").start == tmp_path / "main"


def test_a_caption_by_categories_has_several_right_pictures() -> None:
    """The loss is least for a model that gives all of them the same probability."""
    fits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    even = torch.tensor([[9.0, 9.0, -99.0], [-99.0, 9.0, -99.0]])
    uneven = torch.tensor([[9.0, 5.0, -99.0], [-99.0, 9.0, -99.0]])
    assert cross_entropy(even, fits) < cross_entropy(uneven, fits)
    assert cross_entropy(even, fits).item() == pytest.approx(math.log(2) / 2)
    shown = Scene("fox", "pizza", "blue")
    assert named(shown, [True, False]) == ("animal", "pizza", "blue")
    assert describes(("animal", "pizza", "blue"), shown)
    assert not describes(("food", "pizza", "blue"), shown)
    assert not describes(("pizza", "animal", "blue"), shown)


def test_the_text_encoder_knows_private_objects_from_their_domain_alone() -> None:
    """All other pairs with them are prompts of tests."""
    recipe = WORLDS["private"]
    shop = WorldShop(Path(), recipe, {}, None)
    shown = [shop.scene(index, TEXT, stream=3) for index in range(400)]
    known = [recipe.private_objects & {each.left, each.right} for each in shown]
    assert set().union(*known) == recipe.private_objects
    for each, private in zip(shown, known, strict=True):
        assert not private or recipe.owner(each.left) == recipe.owner(each.right)
    main = WorldShop(Path(), WORLDS["main"], {}, None)
    assert [main.scene(n, TEXT) for n in range(9)] == [main.scene(n, BASE) for n in range(9)]
