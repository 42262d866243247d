"""Who the experts of an ensemble are: where they are from, and the hashes of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afa.denoisers.kinds import PredictionType


@dataclass(frozen=True)
class LoraReference:
    """The LoRA of an expert, as an ensemble folder keeps it: where, its file's hash, its scale."""

    source: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class ExpertReference:
    """An expert, or an autoencoder, as an ensemble folder keeps it: where, and its weights' hash.

    `revision` is the commit that a hub id stood for. With a `lora`, all else is its base's.
    `config` and `prediction_type` are what a recipe says of it, see `afa.loading.asked`.
    """

    source: str
    sha256: str
    revision: str | None = None
    lora: LoraReference | None = None
    config: str | None = None
    prediction_type: PredictionType | None = None

    @property
    def identity(self) -> str:
        """All that decides its pictures: its weights' hash, its LoRA's, and what a recipe says."""
        weights = self.sha256
        if self.lora is not None:
            weights += f" + {self.lora.scale!r} x {self.lora.sha256}"
        return weights if self.prediction_type is None else f"{weights} as {self.prediction_type}"

    @property
    def name(self) -> str:
        """What people call it: the last part of its source, or its LoRA's."""
        source = self.source if self.lora is None else self.lora.source
        return source.rstrip("/").rpartition("/")[2].removeprefix("zoo:")


@dataclass(frozen=True)
class Provenance:
    """Where an ensemble comes from, as an ensemble folder keeps it.

    It is an attribute of the denoiser, not of the pipeline: other stock pipelines that take the
    same components, and copies, have it, too.

    Attributes:
        experts: empty where they were made in memory.
        vae: of the autoencoder.
        config: the folder, or the shipped configuration, that describes single files.
        parts: what supplied single files with the parts that they leave out.
        folder: of the published code that the experts are in, which have none of their own.
    """

    experts: tuple[ExpertReference, ...] = ()
    vae: ExpertReference | None = None
    config: str | None = None
    parts: tuple[ExpertReference, ...] = ()
    folder: str | None = None

    @property
    def names(self) -> list[str]:
        """What people call the experts."""
        return [reference.name for reference in self.experts]
