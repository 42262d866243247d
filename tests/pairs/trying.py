"""A row of pairs, tried in both orders, and what is demanded of it."""

from __future__ import annotations

from tests.pairs.features import SPREAD, feature_of
from tests.pairs.matrix import Outcome, outcome_of
from tests.pairs.table import every_pair

#: those that need no second process
PAIRS = [pair for pair in every_pair() if SPREAD.name not in pair]


def tried(family: str, first: str, second: str) -> Outcome:
    """What comes of a pair, in both orders where these can differ."""
    outcomes = [outcome_of(family, (first, second))]
    if first != second and feature_of(first).is_switched and feature_of(second).is_switched:
        outcomes.append(outcome_of(family, (second, first)))
    kinds = {outcome.kind for outcome in outcomes}
    if kinds == {"refused"}:
        return outcomes[0]
    if "refused" in kinds:
        return Outcome("ordered", next(o.message for o in outcomes if o.message))
    return Outcome("close" if "close" in kinds else "equal")
