"""A round of the soak test: typical work of a user, with the bundled models."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from benchmarks.soak import drawn, trained
from benchmarks.soak.fixtures import Round, make_fixtures
from benchmarks.soak.mistakes import mistakes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PARTS: dict[str, Callable[[Round], None]] = {
    "pictures": drawn.pictures,
    "streamed": drawn.streamed,
    "studio": drawn.studio,
    "loras": drawn.loras,
    "families": drawn.families,
    "merged": drawn.merged,
    "compared": drawn.compared,
    "trained": trained.to_the_end,
    "stopped": trained.stopped,
    "left": trained.left,
    "mistakes": mistakes,
}


class Rounds:
    """Runs rounds of all or some parts.

    Args:
        fixtures: A new folder for the inputs of all rounds.
        only: Names of parts; None selects all.
    """

    def __init__(self, fixtures: Path, only: Sequence[str] | None = None) -> None:
        unknown = set(only or ()) - PARTS.keys()
        if unknown:
            sys.exit(f"A round has the parts {', '.join(PARTS)}; came {', '.join(unknown)}.")
        self._parts = {name: PARTS[name] for name in only or PARTS}
        self._fixtures = make_fixtures(fixtures)

    def __call__(self, number: int, folder: Path) -> dict[str, float]:
        """Run the parts one after another; return the seconds of each."""
        seconds = {}
        for name, part in self._parts.items():
            began = time.perf_counter()
            part(Round(number, folder, self._fixtures))
            seconds[name] = time.perf_counter() - began
        return seconds
