"""The prompts by which aggregators are judged on objects that their training never shows.

Development only: half of all pairs of objects, the study's test pairs and the last quarter of the
objects are not judged.
"""

from __future__ import annotations

import itertools
import random

from afa.zoo.scenes import BACKGROUNDS, caption_of, is_held_out, is_judged_early
from afa.zoo.sprites import DOMAIN_OF, DOMAINS, OBJECTS

#: quarters of the objects that development may leave out; the last one is for the final study
CHOICES = (0, 1, 2)
SEEN, ONE, BOTH = "seen x seen", "seen x unseen", "unseen x unseen"
OWN_SEEN, OWN_UNSEEN = "own domain, seen", "own domain, unseen"
GROUPS = (SEEN, ONE, BOTH, OWN_SEEN, OWN_UNSEEN)


def unseen_of(choice: int) -> frozenset[str]:
    """Return the unseen objects of a choice: every fourth one of each domain."""
    return frozenset(
        name
        for objects in DOMAINS.values()
        for name, _ in list(objects)[choice :: len(CHOICES) + 1]
    )


def group_of(left: str, right: str, unseen: frozenset[str]) -> str | None:
    """Return the group of a pair of objects; None for pairs that are not judged."""
    if left == right or not is_judged_early(left, right):
        return None
    count = len({left, right} & unseen)
    if DOMAIN_OF[left] == DOMAIN_OF[right]:
        return {0: OWN_SEEN, 2: OWN_UNSEEN}.get(count)
    if count == 0:  # the base and the aggregators have met all others
        return SEEN if is_held_out(left, right) else None
    return ONE if count == 1 else BOTH


def prompts_of(choice: int, count: int) -> dict[str, list[str]]:
    """Return up to `count` prompts of each group."""
    unseen = unseen_of(choice)
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for left, right in itertools.product(OBJECTS, repeat=2):
        group = group_of(left, right, unseen)
        if group is not None:
            found[group] += [caption_of(left, right, background) for background in BACKGROUNDS]
    order = random.Random(choice)
    return {
        group: order.sample(captions, min(count, len(captions)))
        for group, captions in found.items()
    }


def training_prompts(count: int) -> list[str]:
    """Return captions of all objects: a half each of one domain, and of pairs of two.

    None of their pairs is judged, nor held out of the base's training.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for left, right in itertools.product(OBJECTS, repeat=2):
        is_judged = is_judged_early(left, right) or is_held_out(left, right, "fifth")
        if left != right and not is_judged:
            found[DOMAIN_OF[left] == DOMAIN_OF[right]].append(
                caption_of(left, right, random.Random(left + right).choice(list(BACKGROUNDS)))
            )
    order = random.Random(0)
    chosen = [order.sample(each, min(count // 2, len(each))) for each in found.values()]
    return [caption for each in chosen for caption in each]
