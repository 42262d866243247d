"""May these experts be ensembled at all? Says why not, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.ensemble import check_same_architecture
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.experts import Expert

_SCHEDULE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def check_experts(experts: Sequence[Expert]) -> None:
    """Compare every expert with the first: U-Net, tokenizer, noise schedule and objective.

    Raises:
        AfaError: names the first difference, which expert has it, and what it would do.
    """
    first = experts[0]
    for other in experts[1:]:
        name = f"'{other.reference.source}'"
        check_same_architecture(first.unet, other.unet, name)
        if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise AfaError(
                f"Experts must share one tokenizer: that of {name} has another vocabulary than "
                f"that of '{first.reference.source}'. The same words would mean different tokens."
            )
        for key in (*_SCHEDULE, "rescale_betas_zero_snr"):
            ours, theirs = first.scheduler.config.get(key), other.scheduler.config.get(key)
            if (ours or None) != (theirs or None):
                raise AfaError(
                    f"Experts must share one noise schedule and objective: {name} has {key} = "
                    f"{theirs}, the first expert has {ours}. Their predictions cannot be mixed."
                )
