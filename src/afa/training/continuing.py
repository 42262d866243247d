"""What must be the same when a training continues from its checkpoints."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, options_of
from afa.ensemble.text import EnsembleTextEncoder, configuration_of
from afa.errors import AfaError
from afa.files import read_json
from afa.training.cache.text import hash_tokenizer
from afa.training.earlier import is_earlier, require_same_pixels, require_whole_pictures
from afa.training.listing import Listing, difference

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.reading import Tally
    from afa.training.data import CaptionedImages
    from afa.training.recipe import TrainingRecipe

#: the file of a run that keeps its recipe
RECIPE = "recipe.json"
_DATA = "the data"
#: what of a recipe may change when a run continues: none of it changes a step
FREE: dict[str, tuple[str, ...] | None] = {
    "training": (
        "num_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "trackers",
        "gradient_checkpointing",
        "offload_experts",
        "device",
        # their product with the number of processes is kept in the checkpoints
        "batch_size",
        "gradient_accumulation_steps",
    ),
    "data": ("cache", "cache_folder", "num_workers", "max_broken"),
    "validation": ("every",),
    "previews": None,  # as a whole
}


def essence(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe, as JSON, decides its steps."""
    kept: dict[str, Any] = {}
    for key, section in recipe.items():
        free = FREE.get(key, ())
        if free is None:
            continue
        kept[key] = section
        if isinstance(section, dict):
            kept[key] = {k: v for k, v in section.items() if k not in free}
    training = recipe.get("training") or {}
    if training.get("learning_rate_schedule") == "cosine":  # every step's rate depends on it
        kept["training"]["num_steps"] = training.get("num_steps")
    return kept


def digest(content: Any) -> str:
    """A hash of some JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_settings(settings: TrainingRecipe) -> str:
    """A hash of what decides the steps of a training."""
    return digest(essence({"training": settings.model_dump(mode="json")}))


def configurations(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Hashes of what decides a loss besides weights: the parts' configurations, by name."""
    found = {"the pipeline's options": digest(options_of(pipeline))}
    for name, part in sorted(pipeline.components.items()):
        if part is None:
            continue
        if name.startswith("tokenizer"):
            found[f"the configuration of {name}"] = hash_tokenizer(part)
            continue
        experts = [part]
        if part is denoiser_of(pipeline):
            experts = list(getattr(part, "experts", [part]))
        elif isinstance(part, EnsembleTextEncoder):
            experts = [part.encoders[n] for n in part.encoder_of]
        if all(hasattr(each, "config") for each in experts):
            told = [configuration_of(each) for each in experts]
            found[f"the configuration of {name}"] = digest(told)
    return found


def require_same(began: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Refuse to continue a run with something else than what it began with.

    Args:
        began: hashes by what they are of, from the checkpoint; what it lacks is not compared.
        now: likewise, of this start.
        folder: of the checkpoints.

    Raises:
        AfaError: names all that differs.
    """
    changed = [what for what in now if what in began and began[what] != now[what]]
    if changed:
        raise AfaError(
            "AFA-TRAIN-005",
            f"The checkpoints in '{folder}' were made with another state of: {', '.join(changed)}. "
            "A run continues with what it began with. Restore it, or name another output folder.",
        )


def require_same_data(
    folder: Path,
    began: str | None,
    content: str,
    before: Listing | None,
    now: Listing | None,
    names: CaptionedImages | None,
) -> None:
    """Refuse to continue a run with other data than it began with.

    Args:
        folder: of the run.
        began: a hash of the data that it began with; None where that is not known.
        content: a hash of the data as it is.
        before: the listing of the data as it was, for the error.
        now: likewise, as it is.
        names: the data set, which names samples; None where it cannot.

    Raises:
        AfaError: says what differs.
    """
    if began is not None and began != content:
        raise AfaError(
            "AFA-TRAIN-006",
            f"The data is not that with which the run in '{folder}' began: "
            f"{difference(before, now, names)}. A run continues with the data that it began with. "
            "Restore the data, or name another output folder.",
        )


def require_data_of_run(
    folder: Path,
    began: Mapping[str, str] | None,
    content: str,
    before: Listing | None,
    now: Listing | None,
    names: CaptionedImages | None,
    tally: Tally,
    *,
    validates: bool,
) -> list[str]:
    """Refuse to continue a run with other data; see `require_same_data`.

    Args:
        folder: of the run.
        began: hashes of its newest checkpoint; None of a run that has none.
        content: a hash of all pictures and captions.
        before: the listing of the data as it was, for the error.
        now: likewise, as it is; None where settings decide all of it.
        names: the data set, which names samples; None where it cannot.
        tally: what was converted while all pictures were read; only an earlier release's run needs
            it, see `is_earlier_run`.
        validates: whether pictures are held out.

    Returns: what a user should know, one line each.

    Raises:
        AfaError: it is other data, or the run was begun by an earlier release whose pictures or
            held-out samples were other ones.
    """
    if began is None:
        return []
    notes = []
    if is_earlier_run(folder):
        require_same_pixels(folder, tally)
    if _DATA not in began:
        notes.append(require_whole_pictures(folder, validates=validates))
    require_same_data(folder, began.get(_DATA), content, before, now, names)
    return notes


def is_earlier_run(folder: Path) -> bool:
    """Whether the run in a folder was last continued by a release without `data.background`."""
    written = folder / RECIPE
    return written.is_file() and is_earlier(read_json(written))
