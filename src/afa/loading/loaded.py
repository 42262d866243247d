"""A loaded expert."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL

from afa.denoisers import PipelineKind
from afa.ensemble.references import ExpertReference
from afa.files import read_json

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: the autoencoder settings that must be equal for experts to share one latent space
LATENTS = ("latent_channels", "scaling_factor", "shift_factor")


@dataclass(frozen=True)
class Expert:
    """The parts of one model that an ensemble needs.

    Attributes:
        reference: source and hash of its weights.
        kind: of its pipeline.
        class_name: of its pipeline.
        denoiser: its U-Net or transformer.
        text_encoders: by their names in the pipeline.
        tokenizers: by their names in the pipeline.
        scheduler: for sampling.
        config: the pipeline folder that describes its parts.
        vae: autoencoder of a single file that has one; that of a folder is loaded by
            `afa.loading.single_file.autoencoder`.
        latents: latent settings in its autoencoder's configuration; empty without one.
        options: other arguments of its pipeline.
    """

    reference: ExpertReference
    kind: PipelineKind
    class_name: str
    denoiser: Any
    text_encoders: dict[str, PreTrainedModel]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    scheduler: SchedulerMixin
    config: Path
    vae: AutoencoderKL | None = None
    latents: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def latents_of(config: Path) -> dict[str, Any]:
    """Read the latent settings of an autoencoder's configuration, with the library's defaults."""
    if not config.is_file():
        return {}
    found, defaults = read_json(config), inspect.signature(AutoencoderKL).parameters
    return {key: found.get(key, defaults[key].default) for key in LATENTS}
