"""References to the experts of an ensemble: their sources and the hashes of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.denoisers.objective import PredictionType


@dataclass(frozen=True)
class LoraReference:
    """A reference to an expert's LoRA in an ensemble folder: source, SHA-256 and scale."""

    source: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class ExpertReference:
    """A reference to an expert or an autoencoder in an ensemble folder.

    Attributes:
        source: the path, hub id or bundled name (`zoo:...`).
        sha256: the hash of its weights.
        revision: the commit to which a hub id was resolved.
        lora: its LoRA; the other attributes are then those of the base.
        config: the configuration that the recipe names for a single file.
        prediction_type: the prediction type that the recipe names.
    """

    source: str
    sha256: str
    revision: str | None = None
    lora: LoraReference | None = None
    config: str | None = None
    prediction_type: PredictionType | None = None

    @property
    def identity(self) -> str:
        """Everything that determines its pictures: weights, LoRA, scale and prediction type."""
        weights = self.sha256
        if self.lora is not None:
            weights += f" + {self.lora.scale!r} x {self.lora.sha256}"
        return weights if self.prediction_type is None else f"{weights} as {self.prediction_type}"

    @property
    def name(self) -> str:
        """Its short name: the last part of its source, or of its LoRA's source."""
        source = self.source if self.lora is None else self.lora.source
        return source.rstrip("/").rpartition("/")[2].removeprefix("zoo:")


@dataclass(frozen=True)
class Provenance:
    """The sources of an ensemble, as an ensemble folder stores them.

    It is an attribute of the denoiser, not of the pipeline, so that copies and other stock
    pipelines with the same components have it, too.

    Attributes:
        experts: one reference per expert; empty if the experts were made in memory.
        vae: the autoencoder.
        config: the folder or bundled configuration that describes single files.
        parts: the sources of parts that single files lack.
        folder: the folder of the method's published code that contains the experts; otherwise None.
        words: the words of the training captions; None if they are not known.
        judge: the judge of the drafts that the ensemble uses by itself; see `afa.drafting`.
        drafts: the other settings of these drafts.
    """

    experts: tuple[ExpertReference, ...] = ()
    vae: ExpertReference | None = None
    config: str | None = None
    parts: tuple[ExpertReference, ...] = ()
    folder: str | None = None
    words: tuple[str, ...] | None = None
    judge: ExpertReference | None = None
    drafts: Mapping[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """The experts' short names."""
        return [reference.name for reference in self.experts]
