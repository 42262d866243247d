"""A loaded expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers import PipelineKind
from afa.denoisers.autoencoders import autoencoder_named
from afa.ensemble.references import ExpertReference
from afa.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    vae: Any = None
    latents: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def latents_of(config: Path) -> dict[str, Any]:
    """Read the autoencoder settings that must be equal for experts to share one latent space.

    Raises:
        AfaError: if the autoencoder is not supported.
    """
    if not config.is_file():
        return {}
    found = read_json(config)
    return autoencoder_named(class_of(found)).space(found)


def class_of(config: Mapping[str, Any]) -> str:
    """The name of the class of an autoencoder, from its configuration."""
    return str(config.get("_class_name") or "AutoencoderKL")
