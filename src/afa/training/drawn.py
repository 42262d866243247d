"""Training pictures that the experts draw themselves from prompts, so that no data set is needed.

Each picture is drawn by drafts; see `afa.drafting`. They are kept as PNG files in the cache, in a
folder that is named by a hash of everything that determines them, with a `metadata.jsonl`.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from afa.aggregators import Mean
from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.drafting import routed, use_drafts
from afa.drafting.drafter import judge_identity
from afa.ensemble.guard import decoded
from afa.errors import AfaError
from afa.files import read_text, write_atomic, write_png
from afa.loading.pipeline import with_rules
from afa.loading.planned import companions_of
from afa.loading.task import native_resolution
from afa.loading.truncation import warnings_for
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.provenance import releases
from afa.training.cache import CacheProgress, default_cache_folder
from afa.training.continuing import configurations, digest
from afa.training.data import FolderImages

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from PIL import Image

    from afa.loading.single_file.load import Companions
    from afa.training.engine import Engine
    from afa.training.recipe import PromptedPictures, Recipe

_LIST = "metadata.jsonl"
_MAX_PROMPTS = 100_000_000  # bytes of the file


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a UTF-8 file with one per line; empty lines do not count.

    Raises:
        AfaError: if the file cannot be read, or has no prompt.
    """
    try:
        lines = read_text(path, _MAX_PROMPTS).splitlines()
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-056",
            f"The prompts '{path}' cannot be read as UTF-8 text: {error}. Set data.prompts.file to "
            "a text file with one prompt per line.",
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise AfaError(
            "AFA-TRAIN-057",
            f"The file of prompts '{path}' is empty. Write one prompt per line, and name what the "
            "experts are known for.",
        )
    return prompts


def draw_pictures(
    recipe: Recipe, pipeline: DiffusionPipeline, engine: Engine
) -> Generator[CacheProgress, None, FolderImages]:
    """Draw the pictures of `data.prompts` that the cache lacks; the processes share them.

    Args:
        recipe: of the training.
        pipeline: with the ensemble, whose aggregators are not used.
        engine: the processes.

    Returns: the pictures, with the prompts as captions.

    Raises:
        AfaError: if the prompts or the judge cannot be used, or a picture cannot be drawn.
    """
    asked = recipe.data.prompts
    assert asked is not None, "it is called for recipes with prompts"
    prompts = _in_order(asked)
    ensemble = denoiser_of(pipeline)
    companions = replace(companions_of(recipe, ensemble.dtype), own_vae=True)
    side = recipe.data.resolution
    size = native_resolution(pipeline) if side is None else (side, side)
    yield CacheProgress("hash the judge", 0, None)
    known = ensemble.provenance
    made_from = {
        "models": [
            None if each is None else each.identity
            for each in (*known.experts, known.vae, *known.parts)
        ],
        "configurations": configurations(pipeline),
        "judge": judge_identity(asked.drafts, companions),
        "drafts": asked.drafts.model_dump(mode="json", exclude={"judge"}),
        "prompts": digest(prompts),
        "settings": asked.model_dump(mode="json", exclude={"file", "drafts"}),
        "size": size,
        "dtype": str(ensemble.dtype),
        "releases": releases("afa", "torch", "diffusers", "transformers"),
    }
    place = recipe.data.cache_folder or default_cache_folder()
    folder = place / f"drawn-{digest(made_from)[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    batches = [
        range(start, min(start + asked.batch_size, asked.number))
        for start in range(0, asked.number, asked.batch_size)
    ]
    # by the number of the batch, because other processes write meanwhile
    own = batches[engine.rank :: engine.num_processes]
    missing = [batch for batch in own if not all(_place(folder, n).exists() for n in batch)]
    if missing:
        if recipe.training.offload_experts or engine.is_sharding:
            raise AfaError(
                "AFA-TRAIN-058",
                "The pictures of data.prompts cannot be drawn with offloaded or sharded experts. "
                "Draw them by training one step without training.offload_experts and without FSDP. "
                "Then run this command again.",
            )
        yield from _draw(asked, prompts, pipeline, companions, folder, size, missing, engine)
    engine.wait()
    if engine.is_main and not (folder / _LIST).is_file():
        rows = [
            {"file_name": _place(folder, n).name, "text": prompt}
            for n, prompt in enumerate(prompts)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / _LIST, lines)
    engine.wait()
    return FolderImages(folder)


def _in_order(asked: PromptedPictures) -> list[str]:
    """The prompts of all pictures: each as often as the others, in a random order."""
    prompts = read_prompts(asked.file)
    order = np.random.default_rng(asked.seed).permutation(len(prompts))
    return [prompts[order[n % len(prompts)]] for n in range(asked.number)]


def _draw(
    asked: PromptedPictures,
    prompts: Sequence[str],
    pipeline: DiffusionPipeline,
    companions: Companions,
    folder: Path,
    size: tuple[int, int],
    missing: Sequence[range],
    engine: Engine,
) -> Generator[CacheProgress, None, None]:
    """Draw batches of pictures, with the judge in memory only meanwhile."""
    ensemble = denoiser_of(pipeline)
    untrained = with_rules(pipeline, [Mean() for _ in ensemble.sites])
    use_drafts(untrained, asked.drafts, companions)
    warnings = warnings_for(pipeline, prompts, asked.negative_prompt, asked.guidance)
    notes = (f"Training pictures are drawn in {folder}.", *(f"warning: {w}" for w in warnings))
    yield CacheProgress("draw pictures", 0, len(missing), notes if engine.is_main else ())
    for done, batch in enumerate(missing, start=1):
        pictures = _pictures(asked, untrained, [prompts[n] for n in batch], batch, size)
        for number, picture in zip(batch, pictures, strict=True):
            write_png(_place(folder, number), picture)
        yield CacheProgress("draw pictures", done, len(missing))
    use_drafts(untrained, None)
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _pictures(
    asked: PromptedPictures,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    numbers: Sequence[int],
    size: tuple[int, int],
) -> list[Image.Image]:
    """Draw a batch; the noise of a picture depends only on the seed and its number."""
    generators = [torch.Generator().manual_seed(asked.seed * 1_000_003 + n) for n in numbers]
    kind = kind_of_pipeline(pipeline)
    call: dict[str, Any] = {
        **kind.guidance(asked.guidance, asked.negative_prompt, len(prompts)),
        "height": size[0],
        "width": size[1],
        **kind.call,
    }
    what = f"A batch of {len(prompts)} pictures"
    remedy = smaller_batch(len(prompts), "data.prompts.batch_size", None, "")
    drafted = routed(pipeline, prompts, generators, **call)
    with torch.no_grad(), saying_what_fits(what, remedy), drafted, decoded(pipeline):
        pictures = pipeline(
            prompt=list(prompts), num_inference_steps=asked.num_steps, generator=generators, **call
        ).images
    require_unchanged(pipeline)
    return pictures
