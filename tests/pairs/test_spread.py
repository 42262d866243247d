"""Experts spread over two processes, together with every other feature."""

from __future__ import annotations

import json

import pytest

from tests.pairs.features import NAMES, SPREAD
from tests.pairs.matrix import Outcome
from tests.pairs.table import key_of, recorded
from tests.warm import run_ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    file = tmp_path_factory.mktemp("spread") / "outcomes.json"
    ranks = run_ranks([file], 2, module="tests.pairs.spread")
    assert not any(code for code, *_ in ranks), ranks
    return {name: Outcome(*each) for name, each in json.loads(file.read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unet", "flux"])
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_what_it_means_or_is_refused(
    family: str, name: str, outcomes: dict[str, Outcome]
) -> None:
    assert outcomes[f"{family}: {name}"] == recorded()[family][key_of(SPREAD.name, name)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unet", "flux"])
def test_an_expert_that_is_not_finite_is_named(family: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[f"{family}: nan"] == Outcome("equal")
