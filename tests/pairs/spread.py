"""Run by two processes: experts spread over them, together with every other feature.

The first one writes what came of it: `python -m tests.pairs.spread FILE`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

from tests.pairs.features import NAMES, SPREAD
from tests.pairs.matrix import (
    Outcome,
    Wrong,
    as_json,
    expected_pictures,
    names_who_is_not_finite,
)
from tests.pairs.reference import Expected
from tests.pairs.trying import tried


def _expected_by_first(
    family: str, names: tuple[str, ...], number: int, seed: int
) -> list[Expected]:
    """What the first process computes, for all."""
    is_first = distributed.get_rank() == 0
    given = [expected_pictures(family, names, number, seed) if is_first else None]
    distributed.broadcast_object_list(given)
    assert given[0] is not None, "the first process has sent it"
    return given[0]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    outcomes: dict[str, Outcome] = {}
    for family in ("unet", "flux"):
        for name in NAMES:
            try:
                outcome = tried(family, SPREAD.name, name, _expected_by_first)
            except (Wrong, AssertionError) as error:
                outcome = Outcome("refused", f"WRONG {error}")
            outcomes[f"{family}: {name}"] = outcome
        is_named = names_who_is_not_finite(family, SPREAD.name)
        outcomes[f"{family}: nan"] = Outcome("equal" if is_named else "close")
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(as_json(outcomes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
