"""What an ensemble's parts can draw: it itself, each expert alone, and their uniform merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.drawing.merged import merged_pipeline
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
    """Stock pipelines of an ensemble's parts, made when they are first asked for.

    All share one autoencoder and scheduler, the ensemble's; an expert alone has its own text
    encoders. The merge takes the memory of one more model.

    Args:
        pipeline: with the ensemble.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._made = {ENSEMBLE: pipeline}
        self._experts = expert_names(denoiser_of(pipeline))

    @property
    def names(self) -> list[str]:
        """What can be drawn with, the ensemble last.

        An ensemble whose experts are not in one place, ready to run, draws alone.
        """
        denoiser = denoiser_of(self._made[ENSEMBLE])
        is_ready = denoiser.execution.device is None and not (denoiser.devices or denoiser.exchange)
        if not is_ready:
            return [ENSEMBLE]
        return [*(self._title(n) for n in range(len(self._experts))), MERGE, ENSEMBLE]

    def pipeline(
        self, name: str, speed: Acceleration | Mapping[str, Any] | str = "exact"
    ) -> DiffusionPipeline:
        """One of them, at a speed as `afa.accelerate` takes it.

        Raises:
            AfaError: no such contender or speed.
        """
        if name not in self.names:
            raise AfaError(
                "AFA-DRAW-001", f"Pictures are drawn by {', '.join(self.names)}; came '{name}'."
            )
        if name not in self._made:
            self._made[name] = self._merge() if name == MERGE else self._expert(name)
        made = self._made[name]
        return accelerate(made, speed, plan=getattr(denoiser_of(made), "plan", None))

    def _title(self, expert: int) -> str:
        """An expert's name, or with its number where that is not its own alone."""
        name = self._experts[expert]
        if self._experts.count(name) > 1 or name in (ENSEMBLE, MERGE):
            return f"{name} ({expert})"
        return name

    def _merge(self) -> DiffusionPipeline:
        return merged_pipeline(self._made[ENSEMBLE], WeightedSum(None))

    def _expert(self, name: str) -> DiffusionPipeline:
        whole = self._made[ENSEMBLE]
        n = [self._title(number) for number in range(len(self._experts))].index(name)
        parts = {
            part: encoder.encoders[encoder.encoder_of[n]]
            for part, encoder in whole.components.items()
            if isinstance(encoder, EnsembleTextEncoder)
        }
        parts[kind_of_pipeline(whole).denoiser] = denoiser_of(whole).experts[n]
        alone = build_pipeline(type(whole).__name__, {**whole.components, **parts}, whole.config)
        alone.set_progress_bar_config(disable=True)
        return alone
