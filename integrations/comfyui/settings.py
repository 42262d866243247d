"""The settings of an ensemble in ComfyUI, and how they are applied to afa's denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.ensemble.caching.plan import load_plan
from afa.ensemble.caching.settings import acceleration_of
from afa.ensemble.steering import steer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.ensemble.denoiser import EnsembleDenoiser


@dataclass(frozen=True)
class Settings:
    """What AFA Steer, AFA Speed and AFA Weights set.

    Attributes:
        bias: by expert and stage, as in `afa.steer`; None steers nothing.
        preset: the preset of the feature cache, as in `afa.accelerate`.
        plan: the file of a pruning plan; None runs all experts at all sites.
        records: whether the fusion weights of every step are recorded.
    """

    bias: Mapping[str, Mapping[str, float]] | None = None
    preset: str = "exact"
    plan: Path | None = None
    records: bool = False

    def apply(self, denoiser: EnsembleDenoiser) -> None:
        """Set up a new denoiser.

        Raises:
            AfaError: if a setting does not fit the ensemble; see `afa.steer` and `afa.accelerate`.
        """
        steer(denoiser, self.bias)
        denoiser.plan = None if self.plan is None else load_plan(self.plan)
        denoiser.acceleration = acceleration_of(self.preset)

    def described(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for the recipe in a picture."""
        found = {
            "bias": self.bias and {name: dict(by) for name, by in self.bias.items()},
            "preset": None if self.preset == "exact" else self.preset,
            "plan": self.plan and str(self.plan),
        }
        return {key: value for key, value in found.items() if value}


#: no steering, no cache, no plan, no recording
EXACT = Settings()
