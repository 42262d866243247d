"""Change settings of a run on purpose: what may change, and which steps had which recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.recipe import differing
from afa.training.continuing import essence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Free = Mapping[str, tuple[str, ...] | None]

#: file name of the recipes of a run whose recipe was changed
RECIPES = "recipes.json"
#: settings that `--continue-with` may change. Others would change what the checkpoint holds (sizes
#: of aggregators, EMA), the data, or which pictures are held out.
CHANGEABLE = (
    "training.num_steps",
    "training.learning_rate",
    "training.learning_rate_schedule",
    "training.num_warmup_steps",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.caption_dropout",
    "training.prompt_noise",
    "training.min_snr_gamma",
    "training.velocity_loss",
    "training.entropy_weight",
    "training.balance_weight",
    "training.early_stopping",
    "validation.every",
)
_SHOWN = 80  # characters of a value in a message
_UNSET = object()


class Change(NamedTuple):
    """A setting with another value than before.

    Attributes:
        key: dotted key.
        text: the key with both values.
    """

    key: str
    text: str

    @property
    def is_allowed(self) -> bool:
        """Whether `--continue-with` may change it."""
        return self.key in CHANGEABLE or self.key.startswith(tuple(f"{k}." for k in CHANGEABLE))


def changes_between(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Free | None = None
) -> list[Change]:
    """Return the settings that differ between two recipes, as JSON, and determine the steps.

    Args:
        before: the earlier recipe.
        now: the later one.
        free: see `essence`.
    """
    found = []
    for key in differing(essence(before, free), essence(now, free)):
        old, new = _value(before, key), _value(now, key)
        if old != new:  # equal: num_steps, which counts only with another schedule
            found.append(Change(key, f"{key}: {_shown(old)} -> {_shown(new)}"))
    return found


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part, _UNSET) if isinstance(value, dict) else _UNSET
    return value


def _shown(value: Any) -> str:
    text = "unset" if value is _UNSET else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def said_of(changes: Sequence[Change]) -> str:
    """Describe changes, and whether `--continue-with` may make them, for an error."""
    refused = [change.key for change in changes if not change.is_allowed]
    texts = ", ".join(change.text for change in changes)
    if refused:
        return f"{texts}. Within a run, {', '.join(refused)} cannot change"
    return f"{texts}. Add --continue-with to change this on purpose, from the last checkpoint on"


def require_changeable(changes: Sequence[Change], output: Path) -> None:
    """Check that `--continue-with` may make these changes.

    Raises:
        AfaError: if it may not; names them.
    """
    refused = [change for change in changes if not change.is_allowed]
    if refused:
        raise AfaError(
            "AFA-TRAIN-090",
            f"The run in '{output}' cannot continue with another "
            f"{', '.join(change.text for change in refused)}. --continue-with may change "
            f"{', '.join(CHANGEABLE)}. Restore the other settings, or pass a new folder.",
        )


def require_run(recipe: Path) -> None:
    """Check that there is a run for `--continue-with`.

    Args:
        recipe: the file with its recipe.

    Raises:
        AfaError: if there is none.
    """
    if not recipe.is_file():
        raise AfaError(
            "AFA-TRAIN-091",
            f"'{recipe.parent}' has no run that could continue; --continue-with is for the folder "
            "of an earlier run. Pass its folder as --output, or remove --continue-with.",
        )


@dataclass(frozen=True)
class History:
    """The recipes of a run.

    Attributes:
        recipes: pairs of a step and the recipe, as JSON, of the steps after it; in order.
        first: the step from which this start resumes.
        free: see `essence`.
    """

    recipes: tuple[tuple[int, dict[str, Any]], ...]
    first: int
    free: Free | None = None

    @classmethod
    def of(
        cls,
        output: Path,
        before: dict[str, Any] | None,
        now: dict[str, Any],
        first: int,
        free: Free | None = None,
    ) -> History:
        """Read the history of a run, and add the recipe of this start.

        Args:
            output: the run's folder.
            before: the recipe of the earlier start; None for a new run.
            now: the recipe of this start.
            first: the step of the newest checkpoint.
            free: see `essence`.

        Raises:
            AfaError: if the history is damaged.
        """
        place = output / RECIPES
        known = _read(place) if place.is_file() else [] if before is None else [(0, before)]
        # steps after the checkpoint are computed again, with the recipe of this start
        kept = [(step, recipe) for step, recipe in known if step < first]
        if not kept:
            kept = [(0, now)]
        elif changes_between(kept[-1][1], now, free):
            kept.append((first, now))
        return cls(tuple(kept), first, free)

    @classmethod
    def up_to(cls, output: Path, recipe: dict[str, Any], step: int) -> History:
        """Read the recipes of the first `step` steps of a run whose last recipe is `recipe`.

        Raises:
            AfaError: if the history is damaged.
        """
        place = output / RECIPES
        known = _read(place) if place.is_file() else [(0, recipe)]
        return cls(tuple(each for each in known if each[0] < step) or ((0, recipe),), step)

    @property
    def has_changed_here(self) -> bool:
        """Whether the recipe changed at the checkpoint from which this start resumes."""
        return len(self.recipes) > 1 and self.recipes[-1][0] == self.first

    @property
    def changes(self) -> list[tuple[int, list[Change]]]:
        """The changes, with the step after which they apply."""
        pairs = zip(self.recipes, self.recipes[1:], strict=False)
        return [(step, changes_between(old, new, self.free)) for (_, old), (step, new) in pairs]

    @property
    def lines(self) -> list[str]:
        """The changes as sentences."""
        return [
            f"After step {step}, the run continued with {', '.join(each.text for each in found)}."
            for step, found in self.changes
        ]

    def write(self, output: Path) -> None:
        """Write the history into a run's folder, if the recipe was ever changed."""
        place = output / RECIPES
        if len(self.recipes) == 1 and not place.exists():
            return
        listed = [{"after_step": step, "recipe": recipe} for step, recipe in self.recipes]
        write_atomic(place, json.dumps({"recipes": listed}, indent=2) + "\n")


def _read(place: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        listed = read_json(place)["recipes"]
        return [(int(each["after_step"]), dict(each["recipe"])) for each in listed]
    except (KeyError, TypeError, ValueError):
        raise AfaError(
            "AFA-TRAIN-093",
            f"'{place}' is not as afa train writes it: it must list the recipes of the run with "
            "their steps. Restore it, or delete it to forget earlier changes.",
        ) from None
