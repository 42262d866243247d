"""The pictures that everything behind a row was trained on, and the seeds of its trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.results.development import samples_of_development
from afa.studies.results.rivals.prompt_router import PromptRouter
from afa.studies.results.rows import (
    AFA,
    DISTILLED,
    DRAFTED,
    LORA,
    MERGED,
    POOLED_ROW,
    PREDICTIONS,
    REAL,
    TOP,
    TUNED,
    WIDE_ROW,
    of_ensemble,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from afa.evaluation.results import Results
    from afa.studies.results.entrants import Entrant, Place
    from afa.studies.results.settings import StudySettings


def budget(
    name: str,
    results: Results,
    place: Place,
    settings: StudySettings,
    samples: Mapping[str, int],
    chosen: Mapping[str, Any],
) -> dict[str, int]:
    """The pictures that everything behind a row was trained on.

    Args:
        name: of the row.
        results: of the comparison.
        place: of the world.
        settings: of the study.
        samples: the pictures of each row's own training.
        chosen: all settings that were chosen.

    Returns: those of its base, its experts and its own training, and `tuning`: those of all
        trainings that chose its settings.
    """
    if name == REAL:
        return {"base": 0, "experts": 0, "own": 0, "tuning": 0}
    world = place.recipe
    batch = world.batch_size
    method = next(each for each in results.recipe.methods if each.name == name)
    # tuned merges and students were made from experts
    of_experts = name.startswith((MERGED, DISTILLED))
    starts_at_base = name == "base" or (method.model is not None and not of_experts)
    used = len(world.experts)
    if starts_at_base:
        used = int(name.startswith("expert:"))
    found = {"base": world.base_steps * batch, "experts": used * world.expert_steps * batch}
    trained = name if name in samples else AFA if of_ensemble(name) else ""
    own = samples.get(trained, 0)
    if name == PromptRouter.row:
        own = PromptRouter.num_pictures  # whose errors label them
    if name in (POOLED_ROW, WIDE_ROW):
        own = world.pooled_steps * batch
    return {**found, "own": own, "tuning": _tuning(name, settings, chosen)}


def _tuning(name: str, settings: StudySettings, chosen: Mapping[str, Any]) -> int:
    """The pictures of the trainings that chose the settings of a row."""
    if name.startswith((AFA, PREDICTIONS, TOP, DISTILLED, DRAFTED)):
        row = PREDICTIONS if name.startswith(PREDICTIONS) else AFA
        return samples_of_development(settings, chosen["developed"]["rows"][row]["num_rates"])
    row = next((row for row in (TUNED, MERGED, LORA) if name.startswith(row)), "")
    if not row:
        return 0
    steps = settings.tuned_steps[0] * len(chosen["rates"][row]["scores"])
    if "pictures" in name:  # whose lengths were chosen, too
        steps += sum({*settings.curve_steps, settings.aggregator_steps})
    return steps * settings.batch_size


def seeds_of(name: str, entrants: Sequence[Entrant]) -> list[int] | None:
    """The seeds of a row's trainings, in the order of its outcomes; None if it has none."""
    trained = AFA if of_ensemble(name) else name
    return [each.seed for each in entrants if each.row == trained] or None
