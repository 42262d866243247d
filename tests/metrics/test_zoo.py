"""The zoo's judges as metrics, on scenes whose content is known."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from afa.metrics import (
    Metric,
    MetricRecipe,
    ReferenceScorer,
    SetMetric,
    inception_score,
    open_metric,
    open_metrics,
)
from afa.zoo.scenes import scenes
from tests.refusal import refusal

if TYPE_CHECKING:
    from afa.metrics import ImageScorer
    from afa.metrics.recipe import MetricName
    from afa.zoo.scenes import Kind

UNSEEN = 123_456  # a seed that trained nothing
SHOWN = list(scenes(24, seed=UNSEEN))
CAPTIONS = [scene.caption for scene in SHOWN]
PICTURES = [Image.fromarray(scene.render()) for scene in SHOWN]


def render(num: int, seed: int, kind: Kind = "any") -> list[Image.Image]:
    return [Image.fromarray(scene.render()) for scene in scenes(num, seed=seed, kind=kind)]


@pytest.fixture(scope="module")
def metrics() -> dict[str, Metric]:
    names: tuple[MetricName, ...] = ("clip_t", "clip_i", "fid", "kid", "cmmd")
    recipes = [MetricRecipe(name=name, weights="zoo:clip") for name in names]
    recipes.append(MetricRecipe(name="is", weights="zoo:classifier"))
    return {metric.name: metric for metric in open_metrics(recipes)}


def test_clip_t_is_high_for_a_pictures_own_caption_alone(metrics: dict[str, ImageScorer]) -> None:
    clip_t = metrics["clip_t"]
    own = clip_t.score(PICTURES, CAPTIONS)
    swapped = [replace(scene, left=scene.right, right=scene.left).caption for scene in SHOWN]
    sides = clip_t.score(PICTURES, swapped)
    shuffled = clip_t.score(PICTURES, CAPTIONS[1:] + CAPTIONS[:1])
    assert min(own) > 0.7
    assert mean(own) > mean(sides) + 0.3
    assert mean(sides) > mean(shuffled) + 0.1
    assert all(right > wrong for right, wrong in zip(own, sides, strict=True))


def test_clip_t_follows_its_pair_wherever_it_stands(metrics: dict[str, ImageScorer]) -> None:
    clip_t = metrics["clip_t"]
    assert clip_t.score(PICTURES[::-1], CAPTIONS[::-1]) == clip_t.score(PICTURES, CAPTIONS)[::-1]


def test_clip_i_is_high_for_a_pictures_own_reference_alone(metrics: dict[str, Metric]) -> None:
    clip_i = metrics["clip_i"]
    assert isinstance(clip_i, ReferenceScorer)
    moved = [replace(scene, offsets=((1, -2), (-1, 2))) for scene in SHOWN]
    generated = clip_i.extractor.features(PICTURES)
    real = clip_i.extractor.features([Image.fromarray(scene.render()) for scene in moved])
    own, shuffled = clip_i.score(generated, real), clip_i.score(generated, real.roll(1, 0))
    assert mean(own) > 0.9 > 0.4 > mean(shuffled)
    assert clip_i.score(generated, generated) == pytest.approx([1.0] * len(SHOWN))


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_another_kind_of_scene_is_further_away(metrics: dict[str, Metric], name: str) -> None:
    metric = metrics[name]
    assert isinstance(metric, SetMetric)
    animals, others = (metric.extractor.features(render(40, n, "animals")) for n in (1, 2))
    food = metric.extractor.features(render(40, 3, "food"))
    assert metric.compute(food, animals) > 1.3 * metric.compute(others, animals)


def test_is_counts_the_objects_of_all_halves(metrics: dict[str, Metric]) -> None:
    metric = metrics["is"]
    assert isinstance(metric, SetMetric)
    logits = metric.extractor.features(PICTURES)
    assert logits.shape == (24, 98)
    objects = {name for scene in SHOWN for name in (scene.left, scene.right)}
    assert metric.compute(logits) == pytest.approx(len(objects), rel=0.25)
    assert metric.compute(logits) == inception_score(torch.cat([logits[:, :49], logits[:, 49:]]))
    assert metric.compute(logits[:1].expand(5, -1)) == pytest.approx(2, abs=0.01)


def test_what_is_better(metrics: dict[str, Metric]) -> None:
    higher = {name for name, metric in metrics.items() if metric.higher_is_better}
    assert higher == {"clip_t", "clip_i", "is"}


def test_real_pictures_are_given_where_they_are_needed(metrics: dict[str, Metric]) -> None:
    features = torch.randn(4, 98)
    for name, real in (("fid", None), ("is", features)):
        metric = metrics[name]
        assert isinstance(metric, SetMetric)
        with refusal("AFA-METRIC-013", f"'{name}'"):
            metric.compute(features, real)


def test_kid_takes_the_recipes_subsets() -> None:
    features = torch.randn(30, 8)
    kid = open_metric(MetricRecipe(name="kid", weights="zoo:clip", subset_size=31))
    assert isinstance(kid, SetMetric)
    with refusal("AFA-METRIC-004", "2", "30"):
        kid.compute(features, features)


def test_every_picture_has_a_prompt(metrics: dict[str, ImageScorer]) -> None:
    with refusal("AFA-METRIC-016", "24", "23"):
        metrics["clip_t"].score(PICTURES, CAPTIONS[:-1])
    with refusal("AFA-METRIC-015"):
        metrics["clip_t"].score([], [])


def test_the_classifier_sees_scenes_only(metrics: dict[str, Metric]) -> None:
    metric = metrics["is"]
    assert isinstance(metric, SetMetric)
    with refusal("AFA-METRIC-011", "64x64", r"\(32, 64\)"):
        metric.extractor.features([PICTURES[0].resize((32, 64))])
