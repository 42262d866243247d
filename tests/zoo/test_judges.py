"""The judges of emoji scenes: right on real scenes, not to be fooled, honest about chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from afa.studies.zoo_build.evaluate import scores_of
from afa.zoo import assets
from afa.zoo.judges import Verdict, judge, load_classifier
from afa.zoo.models import ObjectClassifier
from afa.zoo.scenes import Scene, scenes
from tests.refusal import refusal

UNSEEN = 123_456  # a seed that trained nothing


@pytest.fixture(scope="module")
def classifier() -> ObjectClassifier:
    return load_classifier()


def draw(shown: Scene) -> Image.Image:
    return Image.fromarray(shown.render())


def test_real_scenes_are_right(classifier: ObjectClassifier) -> None:
    shown = list(scenes(200, seed=UNSEEN, kind="mixed", held_out=True))
    verdicts = judge(classifier, [draw(s) for s in shown], [s.caption for s in shown])
    assert sum(v.both and v.objects and v.left and v.right for v in verdicts) >= 198


def test_swapped_sides_are_both_objects_but_not_right(classifier: ObjectClassifier) -> None:
    shown = list(scenes(50, seed=UNSEEN))
    swapped = [replace(s, left=s.right, right=s.left).caption for s in shown]
    verdicts = judge(classifier, [draw(s) for s in shown], swapped)
    assert not any(v.both or v.left or v.right for v in verdicts)
    assert sum(v.objects for v in verdicts) >= 49


def test_one_object_twice_is_half_right(classifier: ObjectClassifier) -> None:
    shown = list(scenes(50, seed=UNSEEN))
    twice = [draw(replace(s, right=s.left)) for s in shown]
    verdicts = judge(classifier, twice, [s.caption for s in shown])
    assert not any(v.both or v.objects or v.right for v in verdicts)
    assert sum(v.left for v in verdicts) >= 49


def test_what_shows_no_object_is_no_object(classifier: ObjectClassifier) -> None:
    shown = list(scenes(60, seed=UNSEEN))
    captions = [s.caption for s in shown]
    blank = [Image.new("RGB", (64, 64), colour) for colour in ("white", "gray", "black")] * 20
    other = [draw(s) for s in shown[1:] + shown[:1]]
    blends = [Image.blend(draw(s), o, 0.5) for s, o in zip(shown, other, strict=True)]
    assert not any(v.left or v.right for v in judge(classifier, blank, captions))
    assert sum(v.left or v.right for v in judge(classifier, blends, captions)) <= 6


def test_judging_refuses_what_it_cannot_judge(classifier: ObjectClassifier) -> None:
    scene = Scene("fox", "pizza", "blue")
    with refusal("AFA-ZOO-003", "64x64", r"\(32, 32\)"):
        judge(classifier, [draw(scene).resize((32, 32))], [scene.caption])
    with refusal("AFA-ZOO-004"):
        judge(classifier, [draw(scene)], ["a fox"])


def test_clip_tells_captions_apart_by_objects_and_sides() -> None:
    clip = CLIPModel.from_pretrained(assets() / "judges" / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(assets() / "shared" / "tokenizer")
    shown = list(scenes(100, seed=UNSEEN))
    captions = [s.caption for s in shown]
    captions += [replace(s, left=s.right, right=s.left).caption for s in shown]
    pictures = np.stack([s.render() for s in shown])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = clip(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image
    assert (logits.argmax(1) == torch.arange(100)).float().mean() >= 0.95
    assert F.cross_entropy(logits, torch.arange(100)) < 0.5


def test_a_score_sums_verdicts_up() -> None:
    right, swapped = Verdict(True, True, True, True), Verdict(False, False, False, True)
    scores = scores_of([right, swapped, swapped, Verdict(True, False, False, False)])
    assert (scores["both"].mean, scores["objects"].mean) == (0.25, 0.75)
    assert scores["both"].low < 0.25 < scores["both"].high
