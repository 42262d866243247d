"""Record the predictions of a teacher: while it draws, and on noised pictures.

The predictions are kept in shards of one batch. A batch depends only on its number, so that an
interrupted recording continues, several processes share it, and a run that needs fewer pictures
uses the first ones.
"""

from __future__ import annotations

import gc
import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.distilling.capture import captured
from afa.distilling.features import FeatureTap, sizes_at
from afa.distilling.predictions import Predictions, Rows
from afa.drawing.merged import with_parts
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError
from afa.evaluation.prompts import load_prompts
from afa.evaluation.work import draw
from afa.files import read_json, write_atomic
from afa.loading.pipeline import native_resolution, size_multiple
from afa.loading.truncation import warnings_for
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.machine.processes import fixed_threads
from afa.reading import BrokenSample
from afa.recipe import differing
from afa.training.cache import CacheProgress
from afa.training.cache.files import shard_name
from afa.training.continuing import digest
from afa.training.data import open_data
from afa.training.encoding import as_batch, encode_captions, encode_pictures, latent_shape
from afa.training.examples import Broken, Order
from afa.training.listing import digest_of
from afa.training.objective import forward_process
from afa.training.prepare import require_resolution
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.distilling.capture import Seen
    from afa.distilling.recipe import DistillRecipe, PicturesRecipe, TrajectoriesRecipe
    from afa.distilling.teacher import Teacher
    from afa.training.data import CaptionedImages
    from afa.training.engine import Engine

#: file that records what the predictions in a folder were made from
MADE_FROM = "made_from.json"


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
        factor = pipeline.vae_scale_factor
        return pipeline.vae.config.latent_channels, height // factor, width // factor

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
        order = Order(range(len(self._data)), asked.seed, 0.0, shape)
        items = range(number * self._batch, (number + 1) * self._batch)
        draws = [order.draw(item) for item in items]
        pixels, captions, sizes = [], [], []
        for item, drawn in zip(items, draws, strict=True):
            sample, (picture, caption) = self._first_whole(order.candidates(item))
            variant = transform.variant(drawn.variant)
            pixels.append(transform(picture, sample, variant))
            sizes.append(transform.sizes(picture.size, sample, variant))
            captions.append(caption)
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
            if kind_of_pipeline(pipeline).family.batches_guidance:
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

    def _first_whole(self, candidates: Iterator[int]) -> tuple[int, tuple[Any, str]]:
        """Return the first sample that can be read.

        Raises:
            AfaError: if too many pictures are broken.
        """
        for sample in candidates:
            try:
                return sample, self._data[sample]
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


def record_predictions(
    teacher: Teacher,
    passes: Sequence[Pass],
    folder: Path,
    engine: Engine,
    should_stop: Callable[[], object] = lambda: None,
) -> Iterator[CacheProgress]:
    """Record the predictions that `folder` lacks, with the teacher in memory only meanwhile.

    Args:
        teacher: its pipeline is loaded if predictions are missing.
        passes: what is recorded.
        folder: of all recorded predictions.
        engine: the processes, which share the batches.
        should_stop: called after every batch; may raise.

    Yields: progress.

    Raises:
        AfaError: if the folder has predictions of another teacher or of other settings, these would
            take more than `recording.max_disk` or than the disk has, or a file of the teacher is
            written meanwhile.
    """
    recipe = teacher.recipe
    size = recipe.recording.batch_size
    units = [(each, n) for each in passes for n in range(-(-each.num_items // size))]
    if engine.is_main:
        yield CacheProgress("hash the teacher", 0, None)
        _claim(folder, passes, identity := teacher.identity())
    engine.wait()
    missing = [(each, n) for each, n in units if not _place(folder, each, n).exists()]
    done = len(units) - len(missing)
    if not missing:
        return
    pipeline = teacher.load(engine.device)
    if engine.is_main and teacher.identity() != identity:
        raise AfaError(
            "AFA-DISTILL-010",
            "A file of the teacher was replaced while it was loaded; nothing was recorded. Run the "
            "command again when nothing else writes these files.",
        )
    tap = None
    if recipe.sites:
        pipeline = _as_ensemble(pipeline)
        tap = FeatureTap(denoiser_of(pipeline), recipe.sites)
    notes = tuple(f"warning: {line}" for each in passes for line in each.check(pipeline))
    if engine.is_main:
        _require_space(recipe, folder, pipeline, units, missing)
        yield CacheProgress("record predictions", done, len(units), notes)
    dtype = getattr(torch, recipe.recording.dtype)
    with fixed_threads(recipe.recording.num_threads):
        for n, (each, number) in enumerate(missing):
            if n % engine.num_processes == engine.rank:
                found = each.record(pipeline, number, tap)
                _require_finite(each, number, found)
                require_unchanged(pipeline)
                _write(_place(folder, each, number), found, dtype)
                should_stop()
            yield CacheProgress("record predictions", done + n + 1, len(units))
    engine.wait()
    del pipeline, tap
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _as_ensemble(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline whose denoiser has sites: the given one, or a single model's shell."""
    denoiser = denoiser_of(pipeline)
    if isinstance(denoiser, EnsembleDenoiser):
        return pipeline
    return with_parts(pipeline, {kind_of_pipeline(pipeline).denoiser: EnsembleDenoiser([denoiser])})


def read_rows(each: Pass, folder: Path, batch_size: int) -> Rows:
    """Open the recorded predictions of a complete pass."""
    return Rows(folder / each.name, -(-each.num_items // batch_size), each.num_items)


def _place(folder: Path, each: Pass, number: int) -> Path:
    return folder / each.name / shard_name(number)


def _claim(folder: Path, passes: Sequence[Pass], identity: dict[str, Any]) -> None:
    """Record what predictions are made from, or require that they were made from the same.

    Raises:
        AfaError: if they were not, or cannot be written.
    """
    for each in passes:
        place = folder / each.name / MADE_FROM
        now = json.loads(json.dumps({"teacher": identity, **each.inputs}))
        if place.is_file():
            before = read_json(place)
            if before != now:
                keys = sorted({key.split(".")[0] for key in differing(before, now)})
                raise AfaError(
                    "AFA-DISTILL-004",
                    f"The predictions in '{place.parent}' were made with another "
                    f"{', '.join(keys)}. Restore these, or delete the folder to record again, or "
                    "pass another output folder.",
                )
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(now, indent=2) + "\n")


def _require_space(
    recipe: DistillRecipe,
    folder: Path,
    pipeline: DiffusionPipeline,
    units: Sequence[tuple[Pass, int]],
    missing: Sequence[tuple[Pass, int]],
) -> None:
    """Check the size of all predictions before they are recorded.

    Raises:
        AfaError: if it is above the limit, or above the disk's free space.
    """
    itemsize = getattr(torch, recipe.recording.dtype).itemsize
    shapes = {each.name: each.shape(pipeline) for each, _ in units}
    if len(set(shapes.values())) > 1:
        raise AfaError(
            "AFA-DISTILL-005",
            f"The latents of trajectories have the shape {shapes['trajectories']}, those of "
            f"pictures {shapes['pictures']}; they must be equal. Set pictures.data.resolution, or "
            "height and width of trajectories.",
        )
    shape = next(iter(shapes.values()))
    values = 3 * torch.Size(shape).numel()
    if recipe.sites:
        values += 2 * sizes_at(denoiser_of(pipeline), recipe.sites, *shape[1:])
    per_latent = values * itemsize

    def num_bytes(batches: Sequence[tuple[Pass, int]]) -> int:
        return per_latent * sum(each.num_latents(number) for each, number in batches)

    needed, limit = num_bytes(units), recipe.recording.max_disk
    remedy = "record fewer trajectories or pictures, or set recording.dtype: bfloat16"
    if needed > limit:
        raise AfaError(
            "AFA-DISTILL-006",
            f"The recorded predictions need {needed / 1e9:.2f} GB; recording.max_disk is "
            f"{limit / 1e9:.2f} GB. Raise it, {remedy}.",
        )
    free, more = shutil.disk_usage(folder).free, num_bytes(missing)
    if more > free:
        raise AfaError(
            "AFA-DISTILL-007",
            f"The recorded predictions need {more / 1e9:.2f} GB more; the disk of '{folder}' has "
            f"{free / 1e9:.2f} GB. Set recording.folder to another disk, {remedy}.",
        )


def _require_finite(each: Pass, number: int, found: Predictions) -> None:
    tensors = (found.noisy, found.conditional, found.unconditional)
    if not all(t is None or bool(torch.isfinite(t).all()) for t in tensors):
        raise AfaError(
            "AFA-DISTILL-008",
            f"The teacher's predictions in batch {number} of {each.name} are not all finite. Set "
            "recording.dtype: float32, or check the teacher with afa generate.",
        )


def _write(place: Path, found: Predictions, dtype: torch.dtype) -> None:
    try:
        found.write(place, dtype)
    except OSError as error:
        with suppress(OSError):
            place.unlink(missing_ok=True)
        raise AfaError(
            "AFA-DISTILL-009",
            f"The predictions '{place}' cannot be written: {error}. Earlier ones are intact. Free "
            "disk space, and run the same command again to continue.",
        ) from error
