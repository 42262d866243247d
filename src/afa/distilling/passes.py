"""Sources of a teacher's predictions: pictures that it draws, and noised pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from afa.denoisers.autoencoders import autoencoder_of
from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.distilling.capture import captured
from afa.distilling.predictions import Predictions
from afa.errors import AfaError
from afa.evaluation.prompts import load_prompts
from afa.evaluation.work import draw
from afa.loading.task import native_resolution, size_multiple
from afa.loading.truncation import warnings_for
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.reading import BrokenSample
from afa.training.continuing import digest
from afa.training.data import open_data
from afa.training.data.images import repeated, sample_of
from afa.training.encoding import as_batch, encode_captions, encode_pictures, latent_shape
from afa.training.examples import Broken, Order
from afa.training.listing import digest_of
from afa.training.prepare import require_resolution
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers import DiffusionPipeline

    from afa.distilling.capture import Seen
    from afa.distilling.features import FeatureTap
    from afa.distilling.recipe import DistillRecipe, PicturesRecipe, TrajectoriesRecipe
    from afa.training.data import CaptionedImages


class Pass(Protocol):
    """One source of predictions.

    Attributes:
        name: of its folder, and for progress.
        num_items: number of its pictures.
        inputs: everything that determines its predictions except the teacher.
    """

    name: str
    num_items: int
    inputs: dict[str, Any]

    def check(self, pipeline: DiffusionPipeline) -> list[str]:
        """Check that it fits the loaded teacher; returns warnings, one line each."""

    def num_latents(self, number: int) -> int:
        """Return the number of noisy latents in a batch, apart from extra calls of a scheduler."""

    def shape(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """Return the shape [C, H, W] of the latents."""

    def record(
        self, pipeline: DiffusionPipeline, number: int, tap: FeatureTap | None
    ) -> Predictions:
        """Compute the predictions of a batch, with the features that a tap notes."""


class Trajectories:
    """The noisy latents of pictures that the teacher draws; see `Pass`."""

    name = "trajectories"

    def __init__(self, recipe: DistillRecipe, asked: TrajectoriesRecipe) -> None:
        self._asked, self._sampling = asked, recipe.sampling
        texts = [prompt.text for prompt in load_prompts(asked.prompts)]
        # so that the first pictures are of all kinds of prompts
        order = np.random.default_rng(asked.seed).permutation(len(texts))
        self.prompts = [texts[n] for n in order]
        self.num_items = asked.number
        self.inputs: dict[str, Any] = {
            "prompts": digest(self.prompts),
            "sampling": self._sampling.model_dump(
                include={"guidance", "seeds", "batch_size", "negative_prompt", "dtype"}
            ),
            "size": [asked.height, asked.width],
            "num_steps": asked.num_steps,
            "num_threads": self._sampling.num_threads,
        }
        if recipe.sites:
            self.inputs["features"] = recipe.sites

    def check(self, pipeline: DiffusionPipeline) -> list[str]:
        """See `Pass`; prompts that are too long are truncated, for teacher and student alike."""
        asked = self._asked
        return warnings_for(pipeline, self.prompts, asked.negative_prompt, asked.guidance)

    def num_latents(self, number: int) -> int:
        """See `Pass`."""
        return self._sampling.batch_size * self._steps(number)

    def shape(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """See `Pass`."""
        height, width = self._size(pipeline)
        vae = pipeline.vae
        return autoencoder_of(vae).shape(vae.config, height, width)

    def record(
        self, pipeline: DiffusionPipeline, number: int, tap: FeatureTap | None
    ) -> Predictions:
        """See `Pass`."""
        asked, sampling = self._asked, self._sampling
        count = sampling.batch_size
        items = range(number * count, (number + 1) * count)
        texts = [self.prompts[item % len(self.prompts)] for item in items]
        num_steps = self._steps(number)
        size = self._size(pipeline)
        with captured(pipeline, count, size, tap) as seen:
            draw(pipeline, texts, items, asked.seed, num_steps, sampling, "latent")
        height, width = size
        without = [each.unconditional for each in seen if each.unconditional is not None]
        guidance = [each.guidance for each in seen if each.guidance is not None]
        return Predictions(
            items=torch.tensor(items).repeat(len(seen)),
            captions=dict(zip(items, texts, strict=True)),
            without_prompt=asked.negative_prompt,
            noisy=torch.cat([each.noisy for each in seen]),
            timestep=torch.cat([each.timestep for each in seen]),
            conditional=torch.cat([each.conditional for each in seen]),
            unconditional=torch.cat(without) if without else None,
            sizes=torch.tensor([height, width, 0, 0, height, width]).repeat(count * len(seen), 1),
            guidance=torch.cat(guidance) if guidance else None,
            features=_features(seen),
        )

    def _steps(self, number: int) -> int:
        return self._asked.num_steps[number % len(self._asked.num_steps)]

    def _size(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        height, width = native_resolution(pipeline)
        return self._asked.height or height, self._asked.width or width


class Pictures:
    """Noised pictures; see `Pass`."""

    name = "pictures"

    def __init__(self, recipe: DistillRecipe, asked: PicturesRecipe) -> None:
        self._asked, self._batch = asked, recipe.recording.batch_size
        self._negative = ""
        if recipe.trajectories is not None:
            self._negative = recipe.trajectories.negative_prompt
        data = open_data(asked.data)
        self._data: CaptionedImages = data  # type: ignore[assignment]  # streams are refused
        self._broken = Broken(len(self._data), asked.data.max_broken)
        self._samples = repeated(self._data, range(len(self._data)))
        self.num_items = asked.number
        self.inputs = {
            "data": digest_of(self._data),
            "prepared": asked.data.model_dump(
                mode="json", include={"resolution", "crop", "flip", "num_variants", "background"}
            ),
            "seed": asked.seed,
            "negative_prompt": self._negative,
            "batch_size": self._batch,
            "dtype": recipe.recording.dtype,
            "num_threads": recipe.recording.num_threads,
        }
        if len(self._samples) > len(self._data):
            self.inputs["repeats"] = digest(list(self._samples))

    def check(self, pipeline: DiffusionPipeline) -> list[str]:
        """See `Pass`."""
        require_resolution(self._side(pipeline), size_multiple(pipeline))
        forward_process(pipeline.scheduler)
        return []

    def num_latents(self, number: int) -> int:
        """See `Pass`."""
        del number
        return self._batch

    def shape(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """See `Pass`."""
        return latent_shape(pipeline, self._side(pipeline))

    @torch.no_grad()
    def record(
        self, pipeline: DiffusionPipeline, number: int, tap: FeatureTap | None
    ) -> Predictions:
        """See `Pass`."""
        assert tap is None, "the recipe refuses it"
        asked, shape = self._asked, self.shape(pipeline)
        data = asked.data
        transform = Transform(
            self._side(pipeline), data.crop, data.flip, data.num_variants, asked.seed
        )
        order = Order(self._samples, asked.seed, 0.0, shape)
        items = range(number * self._batch, (number + 1) * self._batch)
        draws = [order.draw(item) for item in items]
        pixels, captions, sizes = [], [], []
        for item, drawn in zip(items, draws, strict=True):
            sample, (picture, texts) = self._first_whole(order.candidates(item))
            variant = transform.variant(drawn.variant)
            pixels.append(transform(picture, sample, variant))
            sizes.append(transform.sizes(picture.size, sample, variant))
            captions.append(drawn.one_of(texts))
        what = f"A batch of {self._batch} pictures"
        device = denoiser_of(pipeline).device
        with saying_what_fits(what, smaller_batch(self._batch, "recording.batch_size", None, "")):
            posterior = encode_pictures(pipeline, torch.stack(pixels))
            batch = as_batch(
                posterior, encode_captions(pipeline, captions), draws, pipeline.vae, device
            )
            process = forward_process(pipeline.scheduler)
            timestep = process.timesteps(batch.time)
            noisy, _ = process.noisy_and_target(batch.clean, batch.noise, timestep)
            noisy = noisy.to(pipeline.vae.dtype).float()  # as it is recorded

            def predicted(conditions: dict[str, Any]) -> torch.Tensor:
                conditions = {name: each.to(device) for name, each in conditions.items()}
                conditions["sizes"] = torch.stack(sizes).to(device)
                predict = conditioning_of(pipeline).predict
                model = denoiser_of(pipeline)
                return predict(pipeline, model, noisy, timestep, conditions).float().cpu()

            without = None
            conditional = predicted(batch.conditions)
            if kind_of_pipeline(pipeline).takes_negative:
                empty = [self._negative] * self._batch
                without = predicted(encode_captions(pipeline, empty))
        return Predictions(
            items=torch.tensor(items),
            captions=dict(zip(items, captions, strict=True)),
            without_prompt=self._negative,
            noisy=noisy.cpu(),
            timestep=timestep.float().cpu(),
            conditional=conditional,
            unconditional=without,
            sizes=torch.stack(sizes),
        )

    def _side(self, pipeline: DiffusionPipeline) -> int:
        return self._asked.data.resolution or min(native_resolution(pipeline))

    def _first_whole(self, candidates: Iterator[int]) -> tuple[int, tuple[Any, tuple[str, ...]]]:
        """Return the first sample that can be read.

        Raises:
            AfaError: if too many pictures are broken.
        """
        for sample in candidates:
            try:
                return sample, sample_of(self._data, sample)
            except BrokenSample as error:
                self._broken.note({sample: str(error)})
        raise AfaError("AFA-DISTILL-003", "All pictures are broken; at least one must be readable.")


def _features(seen: Sequence[Seen]) -> dict[str, torch.Tensor]:
    """Return the features of all calls, named as in `Predictions`."""
    found = {
        f"features.{site}": torch.cat([each.features[site] for each in seen])
        for site in seen[0].features
    }
    if seen[0].unconditional is not None:
        found |= {
            f"features_without.{site}": torch.cat([each.features_without[site] for each in seen])
            for site in seen[0].features
        }
    return found


def passes_of(recipe: DistillRecipe) -> list[Pass]:
    """Return the sources of predictions of a recipe.

    Raises:
        AfaError: if prompts or data cannot be read.
    """
    found: list[Pass] = []
    if recipe.trajectories is not None:
        found.append(Trajectories(recipe, recipe.trajectories))
    if recipe.pictures is not None:
        found.append(Pictures(recipe, recipe.pictures))
    return found
