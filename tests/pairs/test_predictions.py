"""Every feature with every other where predictions alone are fused; see docs/compatibility.md."""

from __future__ import annotations

import pytest

from tests.pairs.features import FEATURES
from tests.pairs.matrix import names_who_is_not_finite
from tests.pairs.table import PREDICTIONS, key_of, recorded
from tests.pairs.trying import PAIRS, tried

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # the U-Net runs in CI


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_it_equals_what_it_means_or_is_refused(pair: tuple[str, str]) -> None:
    assert tried(PREDICTIONS, *pair) == recorded()[PREDICTIONS][key_of(*pair)]


def _is_refused(name: str) -> bool:
    return recorded()[PREDICTIONS][key_of(name, name)].kind == "refused"


NAMES = [each.name for each in FEATURES if not (each.in_threads or _is_refused(each.name))]


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_that_is_not_finite_is_named(name: str) -> None:
    assert names_who_is_not_finite(PREDICTIONS, name)
