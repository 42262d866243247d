"""Settings, weights and configurations that must not change when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, options_of
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.prompts import PromptEncoder
from afa.ensemble.text import EnsembleTextEncoder, configuration_of
from afa.errors import AfaError
from afa.loading.predictions import objectives_in
from afa.training.cache.text import hash_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.training.recipe import TrainingRecipe

#: file name of the recipe in a run's folder
RECIPE = "recipe.json"
#: settings that may change when a run is resumed, because they do not change its steps
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
        # checkpoints store their product with the number of processes
        "batch_size",
        "gradient_accumulation_steps",
    ),
    "data": ("cache", "cache_folder", "num_workers", "max_broken"),
    "validation": ("every",),
    "previews": None,  # all of the section
    "drafts": None,  # of the trained ensemble; no step uses them
}


def essence(
    recipe: Mapping[str, Any], more: Mapping[str, tuple[str, ...] | None] | None = None
) -> dict[str, Any]:
    """Return the parts of a recipe, as JSON, that determine its steps.

    Args:
        recipe: the recipe.
        more: further settings that may change, by section, as in `FREE`.
    """
    changing = FREE | dict(more or {})
    kept: dict[str, Any] = {}
    for key, section in recipe.items():
        free = changing.get(key, ())
        if free is None:
            continue
        kept[key] = section
        if isinstance(section, dict):
            kept[key] = {k: v for k, v in section.items() if k not in free}
    training = recipe.get("training") or {}
    ends_early = training.get("early_stopping") is not None
    # every learning rate depends on it, or the last validation
    if training.get("learning_rate_schedule") == "cosine" or ends_early:
        kept["training"]["num_steps"] = training.get("num_steps")
    if ends_early and kept.get("validation"):
        kept["validation"]["every"] = recipe["validation"].get("every")
    return kept


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_settings(settings: TrainingRecipe) -> str:
    """Return a hash of the settings that determine the steps."""
    return digest(essence({"training": settings.model_dump(mode="json")}))


def configurations(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Return hashes of the components' configurations, which determine the loss, by name."""
    found = {"the pipeline's options": digest(options_of(pipeline))}
    if isinstance(ensemble := denoiser_of(pipeline), EnsembleDenoiser):
        found["what the experts predict, and their noise schedules"] = digest(
            objectives_in(ensemble)
        )
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
        elif isinstance(part, PromptEncoder):
            experts = part.encoders
            found["the options of the other experts' pipelines"] = digest(part.described)
        if all(hasattr(each, "config") for each in experts):
            configs = [configuration_of(each) for each in experts]
            found[f"the configuration of {name}"] = digest(configs)
    return found


def require_same(began: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Refuse to resume a run if hashes differ from those in its checkpoint.

    Args:
        began: hashes in the checkpoint, by what they describe; missing ones are not compared.
        now: the same, of this start.
        folder: of the checkpoints.

    Raises:
        AfaError: if any differ.
    """
    changed = [what for what in now if what in began and began[what] != now[what]]
    if changed:
        raise AfaError(
            "AFA-TRAIN-005",
            f"The run of the checkpoints in '{folder}' cannot be resumed, because these changed: "
            f"{', '.join(changed)}. Restore them, or pass another output folder.",
        )
