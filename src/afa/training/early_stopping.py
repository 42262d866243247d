"""End a training when the validation loss has stopped falling, and keep its best weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from afa.training.recipe import EarlyStoppingRecipe, TrainingRecipe


@dataclass
class State:
    """What is stored in checkpoints.

    Attributes:
        step: of the last validation; 0 before the first.
        best_step: step with the lowest validation loss; None before the first finite one.
        best_loss: that loss.
        reference: loss that a validation must improve on by `min_improvement`; None likewise.
        count: validations since the last one that did.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    reference: float | None = None
    count: int = 0


@dataclass
class EarlyStopping:
    """Decide after each validation whether the training ends.

    The decision depends only on the validation losses, so that a resumed run ends at the same step.

    Attributes:
        settings: patience and minimum improvement.
        state: what is known of the validations so far.
        best: trained tensors of the step with the lowest loss, on the CPU; empty before it.
    """

    settings: EarlyStoppingRecipe
    state: State = field(default_factory=State)
    best: dict[str, Tensor] = field(default_factory=dict)

    def see(self, step: int, loss: float) -> bool:
        """Process a validation; returns whether its loss is the lowest so far.

        A step that was seen already is ignored, because a resumed run sees its first one again.
        """
        state = self.state
        if step <= state.step:
            return False
        state.step = step
        is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_best:
            state.best_step, state.best_loss = step, loss
        is_better = math.isfinite(loss) and (
            state.reference is None or loss < state.reference - self.settings.min_improvement
        )
        if is_better:
            state.reference, state.count = loss, 0
        else:
            state.count += 1
        return is_best

    def restart(self) -> None:
        """Count validations from here on: the user continues with other settings."""
        self.state.count = 0

    @property
    def is_over(self) -> bool:
        """Whether the training ends after the last validation."""
        return self.state.count >= self.settings.patience

    def notes(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return asdict(self.state)

    def restore(self, notes: Mapping[str, Any], best: dict[str, Tensor]) -> None:
        """Restore the state of a checkpoint."""
        self.state, self.best = State(**notes), best

    def line(self, step: int, num_steps: int) -> str:
        """Say how the training ended and which weights are kept, for a run of `step` steps."""
        state, count = self.state, self.settings.patience
        text = ""
        if self.is_over:
            text = f"Stopped early after step {step} of {num_steps}: "
            if state.reference is not None:
                text += (
                    f"the last {count} validation {'loss was' if count == 1 else 'losses were'} "
                    f"not more than {self.settings.min_improvement:g} below "
                    f"{state.reference:.6g}. "
                )
            else:
                text += "no validation loss was finite. "
        if state.best_step is None:
            return f"{text}The weights are those of step {step}, the last one."
        return (
            f"{text}The weights are those of step {state.best_step}, with the lowest validation "
            f"loss, {state.best_loss:.6g}."
        )


def refuse_early_stopping(settings: TrainingRecipe) -> None:
    """Refuse early stopping where nothing is validated.

    Raises:
        AfaError: if the settings have it.
    """
    if settings.early_stopping is not None:
        raise AfaError(
            "AFA-TRAIN-092",
            "early_stopping is set, but this training has no validation, which it needs. Remove "
            "early_stopping, or use afa.training.train with a recipe that has validation.",
        )
