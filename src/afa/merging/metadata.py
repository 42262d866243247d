"""The metadata of a merged file: entries that describe the merge, not a single expert.

Keys: the model metadata standard of Stability AI, https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.merging.objectives import METADATA

if TYPE_CHECKING:
    from afa.merging.plan import MergePlan

# entries that describe the format, as opposed to titles, authors, dates and hashes
_DESCRIBING = (
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation"),
    *("modelspec.resolution", "modelspec.encoder_layer", "modelspec.timestep_range"),
    *METADATA,
)


def prediction_entry(predicts: str | None) -> dict[str, str]:
    """Return the metadata entry of a prediction type; empty for types without a standard value."""
    if predicts not in ("epsilon", "v_prediction"):
        return {}
    return {METADATA[0]: "v" if predicts == "v_prediction" else predicts}


def carried_metadata(plan: MergePlan) -> dict[str, str]:
    """Return the metadata of a merged file.

    Contains the first expert's entries that no other expert contradicts, the prediction type if it
    is known, and the experts' names as `modelspec.merged_from`.
    """
    first, *others = [expert.metadata for expert in plan.experts]
    carried = {
        key: first[key]
        for key in _DESCRIBING
        if key in first and all(other.get(key, first[key]) == first[key] for other in others)
    }
    carried |= prediction_entry(plan.predicts)
    if len(plan.experts) > 1:
        names = [Path(expert.source).name for expert in plan.experts]
        carried["modelspec.merged_from"] = ", ".join(names)
    return carried
