"""The ensemble with other numbers of denoising steps than all other rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from afa.evaluation.cost import Cost, measure
from afa.evaluation.work import draw
from afa.loading.ensemble_folder import load_ensemble
from afa.loading.weights import hash_files
from afa.studies.results.rivals.rival import SAMPLING, Drawer, Rival
from afa.studies.results.rows import AFA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image


@dataclass(frozen=True)
class OtherSteps(Rival):
    """A trained ensemble with `num_steps` denoising steps.

    Attributes:
        ensemble: its folder.
    """

    ensemble: Path

    row: ClassVar[str] = AFA

    def identity(self) -> dict[str, Any]:
        """See `Rival.identity`; the ensemble by its weights."""
        weights = hash_files(self.ensemble, [self.ensemble / "aggregators.safetensors"])
        return {**super().identity(), "ensemble": weights}

    def open(self) -> Drawer:
        """See `Rival.open`."""
        return _Ensemble(self)


class _Ensemble(Drawer):
    def __init__(self, asked: OtherSteps) -> None:
        self._asked, self._pipeline = asked, load_ensemble(str(asked.ensemble))
        self._pipeline.set_progress_bar_config(disable=True)

    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """See `Drawer.draw`."""
        steps = self._asked.num_steps
        with measure(self._pipeline) as cost:
            pictures = draw(self._pipeline, captions, numbers, seed, steps, SAMPLING)
        return pictures, cost
