"""Decide which expert draws which region of a picture, from drafts and without any training."""

from afa.drafting.drafter import (
    Drafter,
    batches,
    require_words,
    routed,
    use_drafts,
    way_of,
)
from afa.drafting.own import own_drafts
from afa.drafting.recognition import recognise
from afa.drafting.settings import DraftsRecipe, OwnDrafts

__all__ = [
    "Drafter",
    "DraftsRecipe",
    "OwnDrafts",
    "batches",
    "own_drafts",
    "recognise",
    "require_words",
    "routed",
    "use_drafts",
    "way_of",
]
