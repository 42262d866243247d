"""Conditions for resuming runs of earlier releases.

Releases without `data.background` read pictures with Pillow's `convert("RGB")`, which drops
transparency, clips values of more than 8 bits at 255 and ignores colour profiles. They held out the
last samples of the data, and their checkpoints have no hash of the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.reading import Conversion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.reading import Tally

#: conversions that earlier releases did not do; the others do not change pixels
_NEW = (Conversion.DEPTH, Conversion.ALPHA, Conversion.PROFILE)
_REMEDY = "Pass another output folder, or finish the run with that release."


def is_earlier(recipe: Mapping[str, Any]) -> bool:
    """Whether a release without `data.background` wrote this recipe, as JSON."""
    return "background" not in (recipe.get("data") or {})


def require_same_pixels(folder: Path, tally: Tally) -> None:
    """Refuse to resume a run with pictures whose pixels differ in this release.

    Args:
        folder: of the run.
        tally: conversions of the run's pictures.

    Raises:
        AfaError: if any pictures were converted in a new way.
    """
    changed = [f"{tally.counts[each]} {each.said}" for each in _NEW if tally.counts[each]]
    if changed:
        raise AfaError(
            "AFA-TRAIN-025",
            f"The run in '{folder}' began with an earlier release, which ignored transparency and "
            f"colour profiles and clipped values above 8 bits. This release reads some pictures "
            f"differently: {'; '.join(changed)}. {_REMEDY}",
        )


def require_whole_pictures(folder: Path, *, validates: bool) -> str:
    """Refuse to resume a run with validation whose checkpoints have no hash of the data.

    Args:
        folder: of the run.
        validates: whether pictures are held out.

    Returns: a note for the user, if the run can be resumed.

    Raises:
        AfaError: if pictures are held out.
    """
    if validates:
        raise AfaError(
            "AFA-TRAIN-026",
            f"The run in '{folder}' began with an earlier release, which held out the last samples "
            "and not all captions of a picture. Resuming it would train on held-out pictures. "
            f"{_REMEDY}",
        )
    return (
        "The run began with an earlier release, which stored no hash of the data, so changes of "
        "the data cannot be detected."
    )
