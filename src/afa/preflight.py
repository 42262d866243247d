"""May these experts be ensembled at all? Says why not, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers import check_same_architecture
from afa.errors import AfaError
from afa.experts import LATENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.experts import Expert

_SCHEDULE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def check_experts(experts: Sequence[Expert], *, allow_duplicates: bool = False) -> None:
    """Compare every expert with the first: family, latents, architecture, tokenizer, objective.

    Args:
        experts: all of them.
        allow_duplicates: whether one may be named twice.

    Raises:
        AfaError: names the first difference, which expert has it, and what it would do.
    """
    first = experts[0]
    by_hash: dict[str, str] = {}
    for expert in experts if not allow_duplicates else ():
        hashed, source = expert.reference.identity, expert.reference.name
        if hashed in by_hash:
            raise AfaError(
                f"Experts must differ: '{source}' has the same weights as '{by_hash[hashed]}'. It "
                "would only cost time; leave it out, or set allow_duplicates."
            )
        by_hash[hashed] = source
    for other in experts[1:]:
        name = f"'{other.reference.source}'"
        if other.kind is not first.kind:
            raise AfaError(
                f"Experts must be of one family: {name} is a {other.kind.name} model, "
                f"'{first.reference.source}' is of {first.kind.name}. Their features have nothing "
                "in common."
            )
        for key in LATENTS if first.latents and other.latents else ():
            ours, theirs = first.latents[key], other.latents[key]
            if ours != theirs:
                raise AfaError(
                    f"Experts must share one space of latents: the autoencoder of {name} has "
                    f"{key} = {theirs}, that of '{first.reference.source}' has {ours}. The same "
                    "numbers would mean different pictures."
                )
        check_same_architecture(first.denoiser, other.denoiser, name)
        if first.text_encoders.keys() != other.text_encoders.keys():
            raise AfaError(
                f"Experts must have the same text encoders: {name} has "
                f"{', '.join(other.text_encoders) or 'none'}, '{first.reference.source}' has "
                f"{', '.join(first.text_encoders) or 'none'}. Add what is missing."
            )
        if any(
            part not in other.tokenizers or ours.get_vocab() != other.tokenizers[part].get_vocab()
            for part, ours in first.tokenizers.items()
        ):
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
