"""The prompts of a world, in disjoint sets: for tuning, for development, and for the test."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import TYPE_CHECKING, Literal

from afa.zoo.scenes import BACKGROUNDS, caption_of, is_held_out, is_judged_early, pair_set
from afa.zoo.sprites import OBJECTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afa.studies.worlds.recipe import WorldRecipe

#: what prompts are used for; only the last stage of the study reads those of the test
PromptSet = Literal["tuning", "development", "test"]
_SETS: tuple[PromptSet, ...] = ("tuning", "development")
#: groups of prompts besides an expert's own: pairs of objects of different experts, and those among
#: them with no, one or two private objects
MIXED = "mixed"
KNOWN, ONE_PRIVATE, PRIVATE = "known x known", "known x private", "private x private"


def groups_of(recipe: WorldRecipe) -> tuple[str, ...]:
    """The groups of a world's prompts: those of different experts, then each expert's own."""
    mixed = (KNOWN, ONE_PRIVATE, PRIVATE) if recipe.private else (MIXED,)
    return (*mixed, *recipe.experts)


def prompts_of(recipe: WorldRecipe, used_for: PromptSet, count: int) -> dict[str, list[str]]:
    """Up to `count` distinct prompts of each group, in a random order.

    No pair of objects is in two sets. Pairs of different experts are held out of all training sets;
    an expert's own pairs are in its data.

    Args:
        recipe: the world.
        used_for: the set.
        count: number of prompts of each group; there may be fewer.
    """
    found: dict[str, list[str]] = {group: [] for group in groups_of(recipe)}
    for group, pair in _pairs(recipe, used_for):
        found[group] += [caption_of(*pair, background) for background in BACKGROUNDS]
    order = random.Random(f"{recipe.seed} {used_for}")
    return {
        group: order.sample(captions, min(count, len(captions)))
        for group, captions in found.items()
    }


def _pairs(recipe: WorldRecipe, used_for: PromptSet) -> Iterator[tuple[str, tuple[str, str]]]:
    """All ordered pairs of a set, with their groups."""
    private = recipe.private_objects
    for pair in itertools.permutations(OBJECTS, 2):
        if recipe.is_mixed(*pair):
            count = len(private & set(pair))
            # private objects are in no training pair of two experts, whatever the set
            found = _set_of(*pair) if count else pair_set(*pair)
            if found == used_for:
                yield ((KNOWN, ONE_PRIVATE, PRIVATE)[count] if private else MIXED), pair
            continue
        # an expert's own pairs, of which its data show all that no set of mixed pairs holds out
        is_own = recipe.owner(pair[0]) == recipe.owner(pair[1]) and pair_set(*pair) == "training"
        if is_own and _set_of(*pair) == used_for:
            yield recipe.owner(pair[0]), pair


def _set_of(left: str, right: str) -> PromptSet:
    """The set of a pair that `pair_set` does not assign to one; none of the test was judged."""
    assigned = pair_set(left, right)
    if assigned == "tuning" or assigned == "development":
        return assigned
    if not is_judged_early(left, right):
        return "test"
    text = "+".join(sorted((left, right)))
    return _SETS[hashlib.sha256(text.encode()).digest()[0] % len(_SETS)]


def training_prompts(recipe: WorldRecipe, count: int) -> list[str]:
    """Up to `count` captions without any pair that is held out, for teachers that draw them.

    Objects that are private to an expert are named beside others of their domain: everybody can
    write their names, but all other pairs with them are prompts of tests.

    Args:
        recipe: the world.
        count: number of captions; there may be fewer.
    """
    private = recipe.private_objects
    captions = [
        caption_of(left, right, background)
        for left, right in itertools.permutations(OBJECTS, 2)
        if (private.isdisjoint((left, right)) or recipe.owner(left) == recipe.owner(right))
        and not is_held_out(left, right, "fifth")
        for background in BACKGROUNDS
    ]
    return random.Random(f"{recipe.seed} training").sample(captions, min(count, len(captions)))
