"""Build the pipeline of a static merge of experts in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.predictor import Predictor
from afa.ensemble.text import EnsembleTextEncoder
from afa.errors import AfaError
from afa.loading.pipeline import with_parts
from afa.merging.in_memory import merge_models

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.loading.loaded import Expert
    from afa.merging import MergeMethod


def has_merge(ensemble: EnsembleDenoiser) -> bool:
    """Whether an ensemble's experts predict the same quantity with the same architecture."""
    return ensemble.objectives is None and not isinstance(ensemble.experts[0], Predictor)


def merged_pipeline(
    experts: DiffusionPipeline, method: MergeMethod, base: Expert | None = None
) -> DiffusionPipeline:
    """Merge the denoisers and text encoders of an ensemble's experts.

    Args:
        experts: a pipeline of `load_pipeline`; it is not changed and provides all other components.
        method: merges one tensor of all experts.
        base: the common base model, for methods that need it.

    Returns:
        A pipeline of the same class with the merged models.

    Raises:
        AfaError: if the settings do not fit the experts, the base has another architecture, or the
            experts predict different quantities.
    """
    if not has_merge(denoiser_of(experts)):
        raise AfaError(
            "AFA-DRAW-018",
            "The experts differ in architecture, in what they predict or in their noise schedule, "
            "so their weights have no mean. Compare them without merges.",
        )
    parts: dict[str, Any] = {
        kind_of_pipeline(experts).denoiser: merge_models(
            list(denoiser_of(experts).experts),
            method,
            base=None if base is None else base.denoiser,
        )
    }
    for name, encoder in experts.components.items():
        if isinstance(encoder, EnsembleTextEncoder):
            parts[name] = merge_models(
                [encoder.encoders[n] for n in encoder.encoder_of],
                method,
                base=None if base is None else base.text_encoders[name],
                part=name,
            )
    return with_parts(experts, parts)
