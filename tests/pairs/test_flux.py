"""Every feature with every other on a tiny flow transformer; see docs/compatibility.md."""

from __future__ import annotations

import pytest

from tests.pairs.features import FEATURES, GUARDS, Feature
from tests.pairs.matrix import Outcome, names_who_is_not_finite
from tests.pairs.table import UNET_ONLY, key_of, recorded
from tests.pairs.trying import PAIRS, names_where, tried

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # the U-Net runs in CI


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_it_equals_what_it_means_or_is_refused(pair: tuple[str, str]) -> None:
    assert tried("flux", *pair) == recorded()["flux"][key_of(*pair)]


NAMES = [f.name for f in FEATURES if not f.in_threads and f.name not in UNET_ONLY]


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_that_is_not_finite_is_named(name: str) -> None:
    assert names_who_is_not_finite("flux", name)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_it_is_masked_wherever_it_comes_from(guard: Feature) -> None:
    assert tried("flux", guard.name, "recorder") == Outcome("equal")


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_it_is_named_wherever_it_comes_from(guard: Feature) -> None:
    assert names_where("flux", guard)
