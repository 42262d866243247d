"""Record the predictions of a teacher: while it draws, and on noised pictures.

The predictions are kept in shards of one batch. A batch depends only on its number, so that an
interrupted recording continues, several processes share it, and a run that needs fewer pictures
uses the first ones.
"""

from __future__ import annotations

import gc
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.distilling.features import FeatureTap, sizes_at
from afa.distilling.predictions import Predictions, Rows
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError
from afa.evaluation.work import Claim, Store
from afa.loading.pipeline import with_parts
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.processes import fixed_threads
from afa.training.cache import CacheProgress
from afa.training.cache.files import shard_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.distilling.passes import Pass
    from afa.distilling.recipe import DistillRecipe
    from afa.distilling.teacher import Teacher
    from afa.training.engine import Engine

#: file that records what the predictions in a folder were made from
MADE_FROM = "made_from.json"


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
        identity = teacher.identity()
        Store(folder).claim([_claim(folder, each, identity) for each in passes])
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


def _claim(folder: Path, each: Pass, identity: dict[str, Any]) -> Claim:
    """Return what the predictions of a pass are made from."""
    made_from = {"teacher": identity, **each.inputs}
    return Claim(folder / each.name / MADE_FROM, made_from, f"the {each.name}", ("*.safetensors",))


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
