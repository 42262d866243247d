"""Contenders: pipelines of an ensemble, of each of its experts, and of their uniform merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.drawing.merged import merged_pipeline, with_parts
from afa.ensemble.accelerate import accelerate
from afa.ensemble.protocol import expert_names
from afa.ensemble.text import EnsembleTextEncoder
from afa.errors import AfaError
from afa.merging.weighted import WeightedSum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from afa.ensemble.caching.settings import Acceleration

ENSEMBLE, MERGE = "AFA", "uniform merge"


class Contenders:
    """Pipelines of an ensemble, its experts and their merge, built on first use.

    All share the ensemble's autoencoder and scheduler. A single expert uses its own text encoders.
    The merge needs memory for one more model.

    Args:
        pipeline: the pipeline of the ensemble.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._made = {ENSEMBLE: pipeline}
        self._experts = expert_names(denoiser_of(pipeline))

    @property
    def names(self) -> list[str]:
        """The names of the contenders, the ensemble last.

        If the experts are offloaded or on several devices, the ensemble is the only contender.
        """
        denoiser = denoiser_of(self._made[ENSEMBLE])
        is_ready = denoiser.execution.device is None and not (denoiser.devices or denoiser.exchange)
        if not is_ready:
            return [ENSEMBLE]
        return [*(self._title(n) for n in range(len(self._experts))), MERGE, ENSEMBLE]

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
        if self._experts.count(name) > 1 or name in (ENSEMBLE, MERGE):
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
        parts[kind_of_pipeline(ensemble).denoiser] = denoiser_of(ensemble).experts[n]
        return with_parts(ensemble, parts)
