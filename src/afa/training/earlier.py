"""Runs that an earlier release began: what must hold before this one continues them.

Until `data.background` came, a picture was what Pillow's `convert("RGB")` makes of it: transparency
was dropped, values of more than 8 bits were clipped at 255, and colour profiles were ignored. The
last samples of the data were held out, and checkpoints kept no hash of the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.reading import Conversion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.reading import Tally

#: conversions that earlier releases did not do; all others give the pixels that they had
_NEW = (Conversion.DEPTH, Conversion.ALPHA, Conversion.PROFILE)
_REMEDY = "Name another output folder, or finish it with that release."


def is_earlier(recipe: Mapping[str, Any]) -> bool:
    """Whether a run's recipe, as JSON, was written before there was `data.background`."""
    return "background" not in (recipe.get("data") or {})


def require_same_pixels(folder: Path, tally: Tally) -> None:
    """Refuse to continue a run with pictures that this release reads otherwise.

    Args:
        folder: of the run.
        tally: what was converted while the run's pictures were read.

    Raises:
        AfaError: says of how many pictures, and what is done to them now.
    """
    changed = [f"{tally.counts[each]} {each.said}" for each in _NEW if tally.counts[each]]
    if changed:
        raise AfaError(
            "AFA-TRAIN-025",
            f"The run in '{folder}' was begun by an earlier release, which ignored transparency "
            f"and colour profiles and clipped deep values; now there are pictures "
            f"{'; '.join(changed)}. A run continues with the pixels that it began with. {_REMEDY}",
        )


def require_whole_pictures(folder: Path, *, validates: bool) -> str:
    """Refuse to continue a run whose checkpoints do not tell which samples were held out.

    Args:
        folder: of the run.
        validates: whether pictures are held out.

    Returns: what a user should know of a run that continues.

    Raises:
        AfaError: pictures are held out.
    """
    if validates:
        raise AfaError(
            "AFA-TRAIN-026",
            f"The run in '{folder}' was begun by an earlier release, which held out the last lines "
            "of the data and not whole pictures. To continue it would train on pictures that were "
            f"held out. {_REMEDY}",
        )
    return (
        "The run was begun by an earlier release, which kept no list of its pictures: whether the "
        "data is still the same cannot be told."
    )
