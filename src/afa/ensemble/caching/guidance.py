"""The two halves of a batch with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from afa.denoisers.prompt import once_per_prompt


def is_guided(latent: Tensor) -> bool:
    """Whether both halves of a batch [B, ...] are the same latents, as guidance has them."""
    half, rest = divmod(len(latent), 2)
    return half > 0 and not rest and torch.equal(latent[:half], latent[half:])


def conditional_half(batch: Tensor, conditional_last: bool) -> Tensor:
    """The half with the prompt of [B, ...]; a view."""
    half = len(batch) // 2
    return batch[half:] if conditional_last else batch[:half]


def halved_arguments(
    arguments: Mapping[str, Any], prompt: str, batch: int, conditional_last: bool
) -> dict[str, Any]:
    """The arguments of a denoiser's call for the half with the prompt.

    Args:
        arguments: by name; whatever is [B, ...] in them, however deep, is halved.
        prompt: the one of them that stays the same object in a loop; so does its half.
        batch: B.
        conditional_last: where the half with the prompt is.
    """

    def halved(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_batch = value.ndim > 0 and len(value) == batch
            return conditional_half(value, conditional_last) if is_batch else value
        if isinstance(value, Mapping):
            return {key: halved(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(halved(item) for item in value)
        return value

    text = arguments[prompt]
    own = once_per_prompt(
        text, "conditional half", lambda: conditional_half(text, conditional_last).clone()
    )
    return {**{key: halved(value) for key, value in arguments.items()}, prompt: own}


def joined_halves(conditional: Tensor, guidance: Tensor, conditional_last: bool) -> Tensor:
    """A whole batch, whose unconditional half lies `guidance` away from the other."""
    halves = (conditional - guidance, conditional)
    return torch.cat(halves if conditional_last else halves[::-1])


def guidance_of(prediction: Tensor, conditional_last: bool) -> Tensor:
    """What the conditional half of a prediction [B, ...] has beyond the other."""
    conditional = conditional_half(prediction, conditional_last)
    return conditional - conditional_half(prediction, not conditional_last)
