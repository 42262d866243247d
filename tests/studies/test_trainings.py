"""The trainings that studies and benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from afa.studies.trainings import aggregators, open_scenes, scenes, training
from afa.studies.zoos import SHIPPED, transformers, zoo_in
from afa.training import SceneImages
from afa.zoo import EXPERTS
from afa.zoo.models import AGGREGATOR
from tests.refusal import refusal


def test_aggregators_have_the_shape_of_the_shipped_ones() -> None:
    recipe = aggregators(2, 1_000, learning_rate=3e-4)
    assert [each.source for each in recipe.experts] == [f"zoo:{name}" for name in EXPERTS]
    shape = vars(recipe.aggregator)
    assert shape == {name: getattr(AGGREGATOR, name) for name in shape}
    assert recipe.data.scenes == scenes(2)
    assert recipe.training == training(2, 1_000, learning_rate=3e-4)
    assert (recipe.training.num_steps, recipe.training.seed) == (1_000, 2)


def test_trainings_that_differ_in_their_seed_have_other_scenes() -> None:
    first, second = (open_scenes(scenes(seed)) for seed in (0, 1))
    assert first.fingerprint == SceneImages(100_000, seed=3).fingerprint
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("num_steps", [20, 500])
def test_a_warm_up_is_never_longer_than_its_training(num_steps: int) -> None:
    assert training(0, num_steps).num_warmup_steps == min(50, num_steps)


def test_a_zoo_of_transformers_is_whole(tmp_path: Path) -> None:
    for name in ("base", "animals", "food"):
        (tmp_path / name).mkdir()
    with refusal("AFA-STUDY-003", "lacks things"):
        transformers(tmp_path)
    (tmp_path / "things").mkdir()
    zoo = transformers(tmp_path)
    assert zoo == zoo_in(tmp_path)
    assert zoo.experts.keys() == SHIPPED.experts.keys()
    assert zoo.experts["food"] == str(tmp_path / "food")
