"""SuperDiff: superposition of diffusion models by their densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from afa.evaluation.cost import Cost, measure
from afa.loading.pipeline import load_single
from afa.studies.results.rivals.rival import Drawer, Rival
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from PIL import Image
    from torch import Tensor

    from afa.studies.results.entrants import Place


#: numbers of steps; its sampler is stochastic and needs more than others
STEPS = (10, 50, 100)
#: factors of the log-densities in OR, and those among which the largest number of steps chooses
_TEMPERATURES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NEAR_THE_BEST = (1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class SuperDiff(Rival):
    """The superposition of diffusion models (Skreta et al., 2025, arXiv 2412.17762), algorithm 1.

    A stochastic sampler follows a weighted sum of the experts' scores. The log-densities of each
    expert along the path are estimated from the same calls. OR weights the experts by a softmax of
    them; AND chooses weights with which all of them change alike.

    Attributes:
        logic: `or` or `and`.
        temperature: factor of the log-densities in OR.
    """

    logic: Literal["or", "and"] = "or"
    temperature: float = 1.0

    row: ClassVar[str] = "SuperDiff"

    def open(self) -> Drawer:
        """See `Rival.open`."""
        return _Superposed(self)


def candidates(place: Place) -> dict[str, list[SuperDiff]]:
    """The candidates of both logics, by row, among which tuning prompts choose."""
    return {
        "SuperDiff OR": [
            SuperDiff(place, steps, "or", temperature)
            for steps in STEPS
            for temperature in (_NEAR_THE_BEST if steps == STEPS[-1] else _TEMPERATURES)
        ],
        "SuperDiff AND": [SuperDiff(place, steps, "and") for steps in STEPS],
    }


class _Superposed(Drawer):
    def __init__(self, asked: SuperDiff) -> None:
        self._asked = asked
        self._pipelines = [load_single(source)[0] for source in asked.place.experts.values()]

    @torch.no_grad()
    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """See `Drawer.draw`."""
        first = self._pipelines[0]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in numbers]
        with measure(first) as cost:
            latents = self._latents(captions, generators)
            decoded = first.vae.decode(latents / first.vae.config.scaling_factor).sample
            pictures = first.image_processor.postprocess(decoded, output_type="pil")
        count = 2 * len(self._pipelines) * self._asked.num_steps * len(captions)
        return pictures, Cost(cost.seconds, cost.peak_memory, count, cost.measured_on)

    def _latents(self, captions: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        scheduler = self._pipelines[0].scheduler
        scheduler.set_timesteps(self._asked.num_steps)
        steps = scheduler.timesteps.tolist()
        alphas = [float(scheduler.alphas_cumprod[t]) for t in steps] + [1.0]
        texts = [_both_texts(pipeline, captions) for pipeline in self._pipelines]
        shape = (len(captions), 8, 16, 16)
        latents = _noise(shape, generators)
        logs = torch.zeros(len(captions), len(self._pipelines))
        for t, alpha, following in zip(steps, alphas[:-1], alphas[1:], strict=True):
            guided, plain = self._predictions(latents, t, alpha, texts)
            if alpha < 1e-6:  # pure noise, whose density is the same for all
                clean = guided.mean(1)
                latents = following**0.5 * clean + (1 - following) ** 0.5 * latents
                continue
            latents, logs = self._step(latents, guided, plain, logs, alpha, following, generators)
        return latents

    def _predictions(
        self, latents: Tensor, t: int, alpha: float, texts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The clean latents [B, N, C, H, W] that the experts predict, with guidance and without."""
        guided, plain = [], []
        for pipeline, text in zip(self._pipelines, texts, strict=True):
            velocity = pipeline.unet(latents.repeat(2, 1, 1, 1), t, text).sample
            null, prompted = (
                alpha**0.5 * latents - (1 - alpha) ** 0.5 * each for each in velocity.chunk(2)
            )
            guided.append(null + GUIDANCE_SCALE * (prompted - null))
            plain.append(prompted)
        return torch.stack(guided, 1), torch.stack(plain, 1)

    def _step(
        self,
        latents: Tensor,
        guided: Tensor,
        plain: Tensor,
        logs: Tensor,
        alpha: float,
        following: float,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """One step of the sampler, in the coordinates in which noise is only added.

        With x = latents / sqrt(alpha) and the noise level s, the score of an expert is
        (clean - x) / s^2. The step is that of DDIM with eta = 1.
        """
        now, after = ((1 - a) / a for a in (alpha, following))  # s^2
        place = latents / alpha**0.5
        scores, densities = ((each - place[:, None]) / now for each in (guided, plain))
        change = now - after
        raised = (after * change / now) ** 0.5
        noise = raised * _noise(tuple(latents.shape), generators)
        if self._asked.logic == "or":
            weights = (self._asked.temperature * logs).softmax(1)
        else:
            weights = alike(scores, densities, change, noise)
        move = change * torch.einsum("bn,bnchw->bchw", weights, scores) + noise
        along = torch.einsum("bchw,bnchw->bn", move, densities)
        logs = logs + along - change / 2 * densities.square().sum((2, 3, 4))
        return (place + move) * following**0.5, logs


def alike(scores: Tensor, densities: Tensor, change: float, noise: Tensor) -> Tensor:
    """The weights [B, N], which sum to 1, with which all log-densities change alike.

    Args:
        scores: of the sampler, [B, N, C, H, W].
        densities: scores of the densities, [B, N, C, H, W].
        change: of the variance.
        noise: of this step, [B, C, H, W].
    """
    batch, count = scores.shape[:2]
    flat, other = scores.flatten(2).double(), densities.flatten(2).double()
    system = torch.zeros(batch, count + 1, count + 1, dtype=torch.double)
    system[:, :count, :count] = change * other @ flat.transpose(1, 2)
    system[:, :count, count] = -1  # the common change
    system[:, count, :count] = 1
    right = torch.zeros(batch, count + 1, dtype=torch.double)
    drawn = torch.einsum("bd,bnd->bn", noise.flatten(1).double(), other)
    right[:, :count] = change / 2 * other.square().sum(2) - drawn
    right[:, count] = 1
    # of equal experts, whose system is singular, the solution with the least norm is uniform
    found = torch.linalg.lstsq(system, right[..., None], driver="gelsd").solution[:, :count, 0]
    return found.to(scores.dtype)


def _both_texts(pipeline: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """The text embeddings without and with prompt, [2 B, L, D]."""
    prompted, null = pipeline.encode_prompt(list(captions), "cpu", 1, True, [""] * len(captions))
    return torch.cat([null, prompted])


def _noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise whose rows depend on their generators alone."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=each) for each in generators])
