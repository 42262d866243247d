"""Tries every pair, and writes the table and its record: `make pairs`."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.pairs.features import SPREAD
from tests.pairs.matrix import Outcome, Wrong
from tests.pairs.table import PREDICTIONS, key_of, write
from tests.pairs.trying import PAIRS, tried
from tests.warm import run_ranks


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong: list[str] = []
    outcomes: dict[str, dict[str, Outcome]] = {"unet": {}, "flux": {}, PREDICTIONS: {}}
    for family, found in outcomes.items():
        for pair in PAIRS:
            try:
                found[key_of(*pair)] = tried(family, *pair)
            except (Wrong, AssertionError) as error:
                wrong.append(f"{family}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        ranks = run_ranks([file], 2, module="tests.pairs.spread")
        if not file.exists():
            wrong.append(str(ranks))
        else:
            for name, each in json.loads(file.read_text()).items():
                family, _, other = name.partition(": ")
                if other == "nan":
                    continue
                outcomes[family][key_of(SPREAD.name, other)] = Outcome(*each)
                if "WRONG" in each[1]:
                    wrong.append(f"{name}: {each[1]}")
    sys.stdout.write("\n".join([*wrong, f"{len(wrong)} wrong"]) + "\n")
    if not wrong:
        write(outcomes)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
