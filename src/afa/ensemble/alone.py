"""One model in the shell of an ensemble: for what only ensembles can do, and for single experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.aggregators import Separate
from afa.denoisers import discover_sites
from afa.denoisers.predictor import Predictor
from afa.ensemble.conversion import Objectives
from afa.ensemble.denoiser import EnsembleDenoiser

if TYPE_CHECKING:
    from diffusers import ModelMixin


def in_shell(denoiser: ModelMixin, objectives: Objectives | None = None) -> EnsembleDenoiser:
    """An ensemble of one model, which makes the predictions of that model.

    Args:
        denoiser: the model.
        objectives: what it predicts and what the shell shall predict; None if that is the same.
    """
    rules = [Separate() for _ in discover_sites(denoiser)]
    return EnsembleDenoiser([denoiser], rules, objectives=objectives)


def expert_alone(ensemble: EnsembleDenoiser, expert: int) -> Any:
    """One expert of an ensemble as the denoiser of the ensemble's pipeline.

    Returns: the expert itself, or an ensemble that runs it alone: if its architecture is another
        one than that of the pipeline, or if it predicts something else than the pipeline's
        scheduler expects.
    """
    own, objectives = ensemble.experts[expert], ensemble.objectives
    if isinstance(own, Predictor):  # the pipeline is the first expert's
        return EnsembleDenoiser(
            list(ensemble.experts), None, lambda _: [expert], ensemble.widths, objectives
        )
    if objectives is None or objectives.experts[expert] == objectives.wanted:
        return own
    return in_shell(own, Objectives((objectives.experts[expert],), objectives.wanted))
