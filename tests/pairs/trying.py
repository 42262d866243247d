"""A row of pairs, tried in both orders, and what is demanded of it."""

from __future__ import annotations

from tests.pairs.features import SITES, SPREAD, Feature, feature_of
from tests.pairs.matrix import Outcome, Reference, outcome_of, what_stops
from tests.pairs.table import every_pair
from tests.pairs.world import World

#: those that need no second process
PAIRS = [pair for pair in every_pair() if SPREAD.name not in pair]


def tried(family: str, first: str, second: str, expected: Reference | None = None) -> Outcome:
    """What comes of a pair, in both orders where these can differ; see `outcome_of`."""
    outcomes = [outcome_of(family, (first, second), expected)]
    if first != second and feature_of(first).is_switched and feature_of(second).is_switched:
        outcomes.append(outcome_of(family, (second, first), expected))
    kinds = {outcome.kind for outcome in outcomes}
    if kinds == {"refused"}:
        return outcomes[0]
    if "refused" in kinds:
        return Outcome("ordered", next(o.message for o in outcomes if o.message))
    return Outcome("close" if "close" in kinds else "equal")


def names_where(family: str, guard: Feature) -> bool:
    """Whether drawing is stopped by the name of an expert and of where it is not finite."""
    said, sites = what_stops(family, guard, guard.prepare), World(family).sites
    expected = "its text encoder"
    for place in SITES:
        if f"the {place} site" in guard.name:
            middle = "double.0" if family == "flux" else "mid"
            name = {"first": sites[0].name, "middle": middle, "last": sites[-1].name}[place]
            expected = f"its feature at site '{name}'"
    return f"'1' computed NaN or infinity: {expected}." in said
