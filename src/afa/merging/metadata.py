"""The metadata of a merged file: what describes the model, and nothing that was true of one expert.

Keys: the model metadata standard of Stability AI, https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.merging.objectives import METADATA

if TYPE_CHECKING:
    from afa.merging.plan import MergePlan

# they say how a file of this kind is to be read; titles, authors, dates and hashes do not
_DESCRIBING = (
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation"),
    *("modelspec.resolution", "modelspec.encoder_layer", "modelspec.timestep_range"),
    *METADATA,
)
_SPELLED = {"v_prediction": "v"}  # as the standard has it


def carried_metadata(plan: MergePlan) -> dict[str, str]:
    """What a merged file says of its model.

    The first expert's descriptions that no other expert contradicts, what the models predict where
    any of them says it, and the experts' names under `modelspec.merged_from`.
    """
    first, *others = [expert.metadata for expert in plan.experts]
    carried = {
        key: first[key]
        for key in _DESCRIBING
        if key in first and all(other.get(key, first[key]) == first[key] for other in others)
    }
    if plan.predicts in ("epsilon", "v_prediction"):
        carried[METADATA[0]] = _SPELLED.get(plan.predicts, plan.predicts)
    if len(plan.experts) > 1:
        names = [Path(expert.source).name for expert in plan.experts]
        carried["modelspec.merged_from"] = ", ".join(names)
    return carried
