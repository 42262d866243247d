"""Contenders: pipelines of an ensemble, its experts, their uniform merge, and its student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.drawing.merged import has_merge, merged_pipeline
from afa.ensemble.accelerate import accelerate
from afa.ensemble.alone import expert_alone
from afa.ensemble.protocol import expert_names
from afa.ensemble.text import EnsembleTextEncoder
from afa.errors import AfaError
from afa.loading.pipeline import load_single, with_parts
from afa.loading.student_record import baked_guidance
from afa.merging.weighted import WeightedSum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from afa.ensemble.caching.settings import Acceleration

ENSEMBLE, MERGE, STUDENT = "AFA", "uniform merge", "student"


@dataclass(frozen=True)
class Student:
    """A model that was distilled from an ensemble; see `afa.distilling`.

    Attributes:
        source: its folder.
        identity: the hash of its weights.
        pipeline: its own pipeline.
        guidance: the guidance scale with which it draws; None for any, 1 if guidance is part of its
            prediction.
    """

    source: str
    identity: str
    pipeline: DiffusionPipeline
    guidance: float | None


def load_student(source: str, ensemble: DiffusionPipeline) -> Student:
    """Load a student to be compared with an ensemble.

    Args:
        source: a pipeline folder, a single file, or a hub id.
        ensemble: supplies dtype and device.

    Raises:
        AfaError: if it cannot be loaded, or is of another kind.
    """
    denoiser = denoiser_of(ensemble)
    pipeline, reference = load_single(source, torch_dtype=denoiser.dtype)
    if kind_of_pipeline(pipeline) is not kind_of_pipeline(ensemble):
        raise AfaError(
            "AFA-DRAW-013",
            f"The student '{source}' is a {kind_of_pipeline(pipeline).name} model; the ensemble is "
            f"of {kind_of_pipeline(ensemble).name}. Pass a student of this ensemble.",
        )
    pipeline.set_progress_bar_config(disable=True)
    guidance = None if baked_guidance(Path(source)) is None else 1.0
    return Student(source, reference.identity, pipeline.to(denoiser.device), guidance)


class Contenders:
    """Pipelines of an ensemble, its experts and their merge, built on first use.

    All share the ensemble's autoencoder and scheduler. A single expert uses its own text encoders.
    The merge needs memory for one more model.

    Args:
        pipeline: the pipeline of the ensemble.
        student: its student; None for none.
    """

    def __init__(self, pipeline: DiffusionPipeline, student: Student | None = None) -> None:
        self._made = {ENSEMBLE: pipeline}
        self.student = student
        if student is not None:
            self._made[STUDENT] = student.pipeline
        self._experts = expert_names(denoiser_of(pipeline))

    @property
    def names(self) -> list[str]:
        """The names of the contenders, the ensemble last.

        If the experts are offloaded or on several devices, they and the merge are not among them.
        Experts with different objectives or architectures have no merge.
        """
        denoiser = denoiser_of(self._made[ENSEMBLE])
        is_ready = denoiser.execution.device is None and not (denoiser.devices or denoiser.exchange)
        own = [] if self.student is None else [STUDENT]
        if not is_ready:
            return [*own, ENSEMBLE]
        merge = [MERGE] if has_merge(denoiser) else []
        return [*(self._title(n) for n in range(len(self._experts))), *merge, *own, ENSEMBLE]

    def fields(self, name: str) -> dict[str, Any]:
        """The fields of a picture's recipe that a contender sets: a student's source, guidance."""
        if name != STUDENT or self.student is None:
            return {}
        guidance = {} if self.student.guidance is None else {"guidance": self.student.guidance}
        return {"student": (self.student.source, self.student.identity), **guidance}

    def pipeline(
        self, name: str, speed: Acceleration | Mapping[str, Any] | str = "exact"
    ) -> DiffusionPipeline:
        """The pipeline of a contender.

        Args:
            name: one of `names`.
            speed: see `afa.accelerate`.

        Raises:
            AfaError: if there is no such contender or speed.
        """
        if name not in self.names:
            raise AfaError(
                "AFA-DRAW-001", f"drawn_by must be one of {', '.join(self.names)}; got '{name}'."
            )
        if name not in self._made:
            self._made[name] = (
                merged_pipeline(self._made[ENSEMBLE], WeightedSum(None))
                if name == MERGE
                else self._expert(name)
            )
        made = self._made[name]
        return accelerate(made, speed, plan=getattr(denoiser_of(made), "plan", None))

    def _title(self, expert: int) -> str:
        """The name of an expert, with its number if the name is not unique."""
        name = self._experts[expert]
        if self._experts.count(name) > 1 or name in (ENSEMBLE, MERGE, STUDENT):
            return f"{name} ({expert})"
        return name

    def _expert(self, name: str) -> DiffusionPipeline:
        ensemble = self._made[ENSEMBLE]
        n = [self._title(number) for number in range(len(self._experts))].index(name)
        parts = {
            part: encoder.encoders[encoder.encoder_of[n]]
            for part, encoder in ensemble.components.items()
            if isinstance(encoder, EnsembleTextEncoder)
        }
        parts[kind_of_pipeline(ensemble).denoiser] = expert_alone(denoiser_of(ensemble), n)
        return with_parts(ensemble, parts)
