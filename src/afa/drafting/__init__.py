"""Decide which expert draws which region of a picture, from drafts and without any training."""

from afa.drafting.drafter import Drafter, routed, use_drafts
from afa.drafting.recognition import recognition
from afa.drafting.settings import DraftsRecipe

__all__ = ["Drafter", "DraftsRecipe", "recognition", "routed", "use_drafts"]
