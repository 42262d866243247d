"""Decide which expert draws which region of a picture, from drafts and without any training."""

from afa.drafting.drafter import Drafter, routed, use_drafts
from afa.drafting.recognition import recognise
from afa.drafting.settings import DraftsRecipe

__all__ = ["Drafter", "DraftsRecipe", "recognise", "routed", "use_drafts"]
