"""Whatever is moved or rewritten, results stay as they were, to the bit on the same machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.digests import Digest, machine, of_numbers
from tests.golden.record import Record, differences, recorded
from tests.golden.scenarios import SCENARIOS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As the record was written: the last bits depend on it."""
    torch.set_num_threads(1)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore")  # of libraries, which other tests hold to account
def test_results_are_as_they_were(name: str, tmp_path: Path) -> None:
    assert not differences(name, dict(SCENARIOS[name](tmp_path)), recorded())


def test_the_record_has_every_scenario() -> None:
    assert list(recorded().found) == list(SCENARIOS)


def test_a_difference_is_found_on_any_machine() -> None:
    before, near, far = map(of_numbers, ([1.0, 2.0], [1.0, 2.0000001], [1.0, 2.1]))
    here = Record(machine(), {"a": {"losses": before}})
    elsewhere = Record("another", {"a": {"losses": before}})
    assert not differences("a", {"losses": before}, here)
    assert differences("a", {"losses": near}, here)
    assert not differences("a", {"losses": near}, elsewhere)
    assert differences("a", {"losses": far}, elsewhere)
    missing: dict[str, Digest] = {}
    assert differences("a", missing, elsewhere) == ["a: losses is missing"]
