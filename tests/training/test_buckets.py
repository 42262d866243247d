"""Buckets: which sizes there are, which one a picture gets, and in which order they are used."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from afa.training.buckets import Buckets, buckets_of, crop_lines, require_side, share_lost
from afa.training.grouping import Grouping
from afa.training.order import Shares
from afa.training.recipe import BucketsRecipe, DataRecipe
from afa.training.transform import BucketTransform
from tests.refusal import refusal

KOHYA = Buckets(512, 256, 1024, 64)
#: `make_bucket_resolutions((512, 512), 256, 1024, 64)` of kohya's sd-scripts
KOHYA_SIZES = [
    *((256, side) for side in range(832, 1025, 64)),
    *((320, 704), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384)),
    *((704, 320), (768, 320)),
    *((side, 256) for side in range(832, 1025, 64)),
]


# -- sizes ------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_kohya() -> None:
    assert list(KOHYA.sizes) == KOHYA_SIZES


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 3000), (512, 512)),
        ((100, 100), (512, 512)),
        ((3000, 2000), (640, 384)),
        ((2000, 3000), (384, 640)),
        ((1920, 1080), (640, 384)),
        ((1080, 1920), (384, 640)),
        ((1024, 768), (576, 448)),
        ((768, 320), (768, 320)),
        ((20000, 100), (1024, 256)),
        ((100, 20000), (256, 1024)),
    ],
)
def test_known_answers(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert KOHYA.of(size) == bucket


def test_a_picture_gets_the_bucket_of_which_it_loses_least() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(side) for side in np.exp(rng.uniform(3, 8, 2)))
        found = KOHYA.of((width, height))
        kept = {}
        for size in KOHYA.sizes:  # the visible part, in pixels of the picture
            scale = max(size[0] / width, size[1] / height)
            kept[size] = size[0] * size[1] / scale**2 / (width * height)
        assert kept[found] == pytest.approx(max(kept.values()))
        assert share_lost(found, (width, height)) == pytest.approx(1 - kept[found])
        transform = BucketTransform(512, buckets=KOHYA)
        assert transform.share_lost((width, height)) == pytest.approx(1 - kept[found], abs=0.01)
        assert KOHYA.of((height, width)) == found[::-1]


def test_every_size_keeps_the_rules() -> None:
    for resolution, step in ((512, 64), (1024, 64), (64, 8), (520, 40)):
        buckets = Buckets(resolution, resolution // 2, 2 * resolution, step)
        for size in buckets.sizes:
            assert all(side % step == 0 for side in size)
            assert math.prod(size) <= resolution**2
            assert size == (resolution // step * step,) * 2 or min(size) >= resolution // 2
            assert max(size) <= 2 * resolution


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((300, 200), (256, 192)),
        ((130, 70), (128, 64)),
        ((63, 200), (256, 832)),  # shorter than one step: enlarged
        ((3000, 2000), (640, 384)),
        ((600, 450), (576, 448)),
        ((580, 470), (576, 448)),
        ((1200, 230), (1024, 256)),  # no size fits into it: enlarged
    ],
)
def test_without_enlargement(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    transform = BucketTransform(512, buckets=Buckets(512, 256, 1024, 64, no_upscale=True))
    assert transform.target(size) == bucket
    assert math.prod(bucket) <= 512**2
    assert transform.enlarges(size) == (size in ((63, 200), (1200, 230)))
    if size in ((300, 200), (130, 70)):  # cropped, not scaled
        lost = 1 - math.prod(bucket) / math.prod(size)
        assert transform.share_lost(size) == pytest.approx(lost)
        assert transform.sizes(size, 0, 0).tolist()[2:4] != [0, 0]


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "multiple", "expected"),
    [
        (512, 8, KOHYA),
        (1024, 16, Buckets(1024, 512, 2048, 64)),
        (64, 8, Buckets(64, 32, 128, 8)),
        (144, 48, Buckets(144, 72, 288, 48)),
    ],
)
def test_defaults(resolution: int, multiple: int, expected: Buckets) -> None:
    assert buckets_of(BucketsRecipe(), resolution, multiple) == expected


def test_the_longest_side_that_experts_support_is_the_default() -> None:
    assert buckets_of(BucketsRecipe(), 512, 8, 768).max_size == 768


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"step": 20}, "AFA-TRAIN-080", ["20", "multiple of 8"]),
        ({"step": 520}, "AFA-TRAIN-080", ["520", "512"]),
        ({"min_size": 600}, "AFA-TRAIN-081", ["600", "64", "512"]),
        ({"min_size": 32}, "AFA-TRAIN-081", ["32", "64"]),
        ({"max_size": 500}, "AFA-TRAIN-082", ["500", "512"]),
        ({"max_size": 2048}, "AFA-TRAIN-083", ["data.buckets.max_size is 2048", "1536"]),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], code: str, said: list[str]) -> None:
    with refusal(code, *said):
        buckets_of(BucketsRecipe(**settings), 512, 8, 1536)


def test_squares_beyond_the_position_embeddings() -> None:
    require_side(1536, 1536)
    require_side(9999, None)
    with refusal("AFA-TRAIN-083", "data.resolution is 1544", "1536"):
        require_side(1544, 1536)


def test_how_it_is_written() -> None:
    def data(**settings: Any) -> DataRecipe:
        return DataRecipe.model_validate({"folder": "x", **settings})

    assert data(buckets=True).buckets == BucketsRecipe() == data(buckets={}).buckets
    assert data().buckets is data(buckets=False).buckets is None
    # so that runs of earlier releases resume
    assert "buckets" not in data().model_dump(mode="json")
    assert data(buckets={"step": 32}).model_dump(mode="json")["buckets"]["step"] == 32


def test_what_square_crops_cut_off() -> None:
    assert crop_lines([]) == crop_lines([(100, 100)] * 9 + [(100, 101)]) == []
    (line,) = crop_lines([(200, 100), (100, 100), (100, 110)])
    assert "20% of the pictures' area" in line  # of 0.5, 0 and 0.09
    assert "1 of 3 pictures loses more than a quarter" in line


# -- order ------------------------------------------------------------------------------------

#: 29 samples of four sizes; 30 has no readable size
TARGETS = {n: (64, 64) if n < 15 else (96, 40) if n < 25 else (40, 96) for n in range(28)}
TARGETS[28] = (128, 32)


def grouping(per_step: int = 4) -> Grouping:
    return Grouping(TARGETS, range(30), per_step, {})


def steps_of(groups: Grouping, num_steps: int, seed: int = 0) -> list[list[int]]:
    total = groups._per_step
    return [
        [next(groups.candidates(place, seed)) for place in range(n * total, (n + 1) * total)]
        for n in range(num_steps)
    ]


def test_a_step_holds_one_bucket_however_it_is_divided() -> None:
    steps = steps_of(grouping(8), 60)
    assert all(len({TARGETS[sample] for sample in step}) == 1 for step in steps)
    for shares in (Shares(8), Shares(4, 2), Shares(2, 2, 2, 1), Shares(1, 4, 2, 0)):
        for row in shares.batches(0, 60):
            step = steps[row[0] // 8]
            found = [next(grouping(8).candidates(place, 0)) for place in row]
            assert found == step[row[0] % 8 : row[0] % 8 + len(row)]


@pytest.mark.parametrize("per_step", [1, 3, 4, 16, 100])
def test_samples_are_used_equally_often(per_step: int) -> None:
    num_steps = 29 * 20  # 20 x per_step epochs, after which nothing remains
    counts = Counter(n for step in steps_of(grouping(per_step), num_steps) for n in step)
    assert counts == dict.fromkeys(range(29), 20 * per_step)
    for length in (7, 50, 333):
        steps = steps_of(grouping(per_step), length)
        used = Counter(TARGETS[step[0]] for step in steps)
        done = length * per_step / 29  # epochs
        for size, members in grouping(per_step).members.items():
            # an epoch in random order, and half a step of rounding
            allowed = 0.5 + 2 * max(1.0, len(members) / per_step)
            assert abs(used[size] - done * len(members) / per_step) <= allowed


def test_the_order_depends_on_the_seed_and_the_place_alone() -> None:
    steps = steps_of(grouping(), 40)
    groups = grouping()
    for place in np.random.default_rng(0).permutation(160):
        assert next(groups.candidates(int(place), 0)) == steps[place // 4][place % 4]
    assert steps_of(grouping(), 40, seed=1) != steps
    buckets = [TARGETS[step[0]] for step in steps]
    assert buckets[:7] != buckets[7:14]  # not in turn


def test_broken_pictures_are_replaced_within_their_bucket() -> None:
    groups = grouping()
    for place in range(40):
        found = list(groups.candidates(place, 0))
        assert sorted(found) == list(range(29))  # all samples that have a size, each once
        own = groups.members[TARGETS[found[0]]]
        assert sorted(found[: len(own)]) == own
    # if a whole bucket is broken, its step is of one other bucket
    broken = set(groups.members[96, 40])
    for step in range(40):
        chosen = [
            next(n for n in groups.candidates(place, 0) if n not in broken)
            for place in range(4 * step, 4 * step + 4)
        ]
        assert len({TARGETS[n] for n in chosen}) == 1


def test_the_validation_is_divided_by_bucket() -> None:
    held_out = [27, 3, 29, 20, 5, 19, 1]  # 29 has no size: the next one is used instead
    groups = Grouping(TARGETS, held_out, 4, {})
    assert groups.rows(7, 2) == [[0], [1, 4], [6], [2, 3], [5]]
    found = [next(groups.candidates_in_order(place)) for place in range(7)]
    assert found == [27, 3, 20, 20, 5, 19, 1]
    assert [n for n in groups.candidates_in_order(4)][:3] == [5, 1, 3]


def test_buckets_that_a_short_training_does_not_use_are_named() -> None:
    for num_steps in range(60):
        used = {TARGETS[step[0]] for step in steps_of(grouping(), num_steps, seed=3)}
        assert set(grouping().unused(num_steps, 3)) == grouping().members.keys() - used
    transform = BucketTransform(64, buckets=Buckets(64, 32, 128, 8))
    summary = grouping().summary(transform, dict.fromkeys(TARGETS, (160, 64)))
    assert summary == (
        "Buckets: 15 of 64x64, 10 of 96x40, 3 of 40x96, 1 of 128x32; crops cut off 4% of the area "
        "on average."
    )
    small, unused = grouping().warnings(8, 0)
    assert "2 buckets have fewer pictures" in small
    assert "(4)" in small
    assert "1 of 128x32" in unused
    assert "8 steps of 4 samples" in unused
    assert len(grouping(1).warnings(10**6, 0)) == 0


def test_no_readable_size_at_all() -> None:
    with refusal("AFA-TRAIN-085", "1 picture "):
        Grouping(TARGETS, [29], 4, {})
