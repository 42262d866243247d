"""Record what a denoiser is asked and answers while a pipeline draws."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from afa.distilling.features import FeatureTap


@dataclass
class Seen:
    """One call of a denoiser for a batch of B pictures.

    Attributes:
        noisy: noisy latents [B, C, H, W].
        timestep: timesteps [B], in those of the scheduler.
        conditional: predictions with prompt [B, C, H, W].
        unconditional: predictions without prompt; None if the pipeline makes none.
        guidance: guidance scale that the denoiser got as an input [B]; None if it takes none.
        features: features with prompt [B, C, H, W], by site.
        features_without: features without prompt; empty if the pipeline makes no such predictions.
    """

    noisy: Tensor
    timestep: Tensor
    conditional: Tensor
    unconditional: Tensor | None
    guidance: Tensor | None
    features: dict[str, Tensor]
    features_without: dict[str, Tensor]


@contextmanager
def captured(
    pipeline: Any, batch_size: int, size: tuple[int, int], tap: FeatureTap | None = None
) -> Iterator[list[Seen]]:
    """Record all calls of a pipeline's denoiser inside the block; the denoiser is not changed.

    Pipelines compute the halves of guidance in one batch, see `Family.prompt_first`, or in two
    calls for the same latents, the one without prompt last.

    Args:
        pipeline: that draws `batch_size` pictures at once.
        batch_size: B.
        size: height and width of the pictures in pixels.
        tap: notes features of the denoiser; None for none.
    """
    family, seen = kind_of_pipeline(pipeline).family, list[Seen]()
    interface = family.interface
    signature = interface.signature(family.model_class)
    last: Tensor | None = None
    unpack = conditioning_of(pipeline).unpack

    def latents(tensor: Tensor) -> Tensor:
        return tensor if unpack is None else unpack(pipeline, tensor, *size)

    def record(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal last
        if getattr(model, "is_drafting", False):
            return
        given = interface.arguments(signature.bind(*args, **kwargs).arguments)
        is_second, last = given[family.latent] is last, given[family.latent]
        noisy = latents(given[family.latent].detach())
        answer = interface.prediction(output[0] if isinstance(output, tuple) else output.sample)
        # some models also predict a variance
        answer = latents(answer.detach())[:, : noisy.shape[1]]
        # the divisor is 1 where the pipeline passes the scheduler's own timesteps
        timestep = torch.as_tensor(given["timestep"]).float() * family.timestep_divisor
        without = None
        assert len(noisy) in (batch_size, 2 * batch_size), "one call predicts all pictures"
        if len(noisy) == 2 * batch_size:
            halves = answer.chunk(2)
            answer, without = halves if family.prompt_first else halves[::-1]
            noisy = noisy[batch_size:]
        guidance = given.get("guidance")
        features = {} if tap is None else {name: f.cpu() for name, f in tap.seen.items()}
        if is_second:
            seen[-1].unconditional, seen[-1].features_without = answer.float().cpu(), features
            return
        own, other = slice(-batch_size, None), slice(None, -batch_size)
        if family.prompt_first and without is not None:
            own, other = slice(batch_size), slice(batch_size, None)
        seen.append(
            Seen(
                noisy.float().cpu(),
                timestep.cpu().flatten()[-1:].expand(batch_size).clone(),
                answer.float().cpu(),
                None if without is None else without.float().cpu(),
                None if guidance is None else guidance.float().cpu(),
                {name: feature[own] for name, feature in features.items()},
                {name: feature[other] for name, feature in features.items()},
            )
        )

    handle = denoiser_of(pipeline).register_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
