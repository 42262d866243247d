"""A router per prompt: one expert draws the whole picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from afa.denoisers.forward_process import forward_process
from afa.evaluation.cost import Cost, measure
from afa.evaluation.work import draw
from afa.loading.pipeline import load_single
from afa.studies.results.rivals.rival import SAMPLING, Drawer, Rival, added
from afa.training.encoding import encode_captions, encode_pictures
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from afa.training.data import CaptionedImages


@dataclass(frozen=True)
class PromptRouter(Rival):
    """One expert draws the picture, chosen from the prompt: a mixture of whole models.

    The labels are the experts with the smallest denoising error on each training picture; a
    logistic regression learns them from the mean text embedding.

    Attributes:
        data: pictures that the aggregators are trained on.
        num_pictures: of these.
        num_levels: noise levels at which the errors are averaged.
    """

    data: CaptionedImages
    num_pictures: int = 1_024
    num_levels: int = 4

    row: ClassVar[str] = "router per prompt"

    def open(self) -> Drawer:
        """See `Rival.open`."""
        return _Routed(self)


class _Routed(Drawer):
    def __init__(self, asked: PromptRouter) -> None:
        self._asked = asked
        sources = asked.place.experts.values()
        self._pipelines = [load_single(source)[0] for source in sources]
        for pipeline in self._pipelines:
            pipeline.set_progress_bar_config(disable=True)
        self._weights = self._fit()

    @torch.no_grad()
    def features(self, captions: Sequence[str]) -> Tensor:
        """The mean text embeddings [B, D] of captions, with a constant."""
        text = encode_captions(self._pipelines[0], captions)["text"].mean(1)
        return torch.cat([text, torch.ones(len(text), 1)], dim=1)

    @torch.no_grad()
    def labels(self, numbers: Sequence[int]) -> tuple[list[str], Tensor]:
        """The captions of training pictures, and the best expert of each."""
        asked, transform = self._asked, Transform(64)
        samples = [asked.data[n] for n in numbers]
        captions = [caption for _, caption in samples]
        pixels = torch.stack([transform(p, n, 0) for n, (p, _) in enumerate(samples)])
        vae, errors = self._pipelines[0].vae, []
        latents = encode_pictures(self._pipelines[0], pixels).mean * vae.config.scaling_factor
        process = forward_process(self._pipelines[0].scheduler)
        for pipeline in self._pipelines:
            text = encode_captions(pipeline, captions)["text"]
            error = torch.zeros(len(samples))
            for level in range(asked.num_levels):
                share = torch.full((len(samples),), (level + 0.5) / asked.num_levels)
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level))
                timestep = process.timesteps(share)
                noisy, target = process.noisy_and_target(latents, noise, timestep)
                found = pipeline.unet(noisy, timestep, text).sample
                error += (found - target).square().mean((1, 2, 3))
            errors.append(error)
        return captions, torch.stack(errors).argmin(0)

    def _fit(self) -> Tensor:
        """The weights [D + 1, N] of a logistic regression with a small penalty."""
        found = [
            self.labels(range(start, min(start + 64, self._asked.num_pictures)))
            for start in range(0, self._asked.num_pictures, 64)
        ]
        features = torch.cat([self.features(captions) for captions, _ in found])
        labels = torch.cat([labels for _, labels in found])
        weights = torch.zeros(features.shape[1], len(self._pipelines), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = F.cross_entropy(features @ weights, labels) + 1e-4 * weights.square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        return weights.detach()

    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """See `Drawer.draw`."""
        chosen = (self.features(captions) @ self._weights).argmax(1).tolist()
        found: dict[int, Image.Image] = {}
        total = Cost()
        for expert, pipeline in enumerate(self._pipelines):
            own = [n for n, each in enumerate(chosen) if each == expert]
            if not own:
                continue
            with measure(pipeline) as cost:
                pictures = draw(
                    pipeline,
                    [captions[n] for n in own],
                    [numbers[n] for n in own],
                    seed,
                    self._asked.num_steps,
                    SAMPLING,
                )
            found |= dict(zip(own, pictures, strict=True))
            total = added(total, cost)
        return [found[n] for n in range(len(captions))], total
