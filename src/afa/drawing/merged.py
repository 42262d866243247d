"""A static merge of experts that are in memory, as a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.text import EnsembleTextEncoder
from afa.merging.in_memory import merge_models

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.loading.loaded import Expert
    from afa.merging import MergeMethod


def merged_pipeline(
    experts: DiffusionPipeline, method: MergeMethod, base: Expert | None = None
) -> DiffusionPipeline:
    """A static merge of an ensemble's experts, their denoisers and their text encoders.

    Args:
        experts: a pipeline of `load_pipeline`, not changed; the other parts are its own.
        method: how one tensor is merged.
        base: what the experts were fine-tuned from, for methods that need it.

    Raises:
        AfaError: settings that do not fit, or a base of another architecture.
    """
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
    return _with(experts, parts)


def _with(pipeline: DiffusionPipeline, parts: dict[str, Any]) -> DiffusionPipeline:
    """A stock pipeline of the same components but these."""
    changed = build_pipeline(
        type(pipeline).__name__, {**pipeline.components, **parts}, pipeline.config
    )
    changed.set_progress_bar_config(disable=True)
    return changed
