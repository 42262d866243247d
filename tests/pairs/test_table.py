"""The page has what the tests have found, and nothing that is refused is missing from the code."""

from __future__ import annotations

from afa.ensemble.combinations import EXCLUDED
from tests.pairs.features import NAMES
from tests.pairs.table import PREDICTIONS, every_pair, in_page, key_of, recorded, rendered
from tests.pairs.trying import PAIRS


def test_the_page_is_what_was_recorded() -> None:
    assert in_page() == rendered(recorded())


def test_no_pair_is_missing() -> None:
    for family, pairs in recorded().items():
        tried = every_pair() if family != PREDICTIONS else PAIRS
        assert set(pairs) == {key_of(*pair) for pair in tried}
    assert len(every_pair()) == len(NAMES) * (len(NAMES) + 1) // 2


def test_every_exclusion_is_tried() -> None:
    """An exclusion that no pair meets would be an untested refusal; tests/shards.py has its own."""
    said = {outcome.message for pairs in recorded().values() for outcome in pairs.values()}
    for excluded in EXCLUDED:
        if "sharded experts" in (excluded.one, excluded.other):
            continue
        assert any(excluded.reason in message for message in said), excluded
