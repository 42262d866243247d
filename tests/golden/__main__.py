"""Writes the golden record, or says what differs from it: `make golden`.

python -m tests.golden            # compare
python -m tests.golden --write    # write it anew
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.golden.record import differences, recorded, write
from tests.golden.scenarios import SCENARIOS


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, scenario in SCENARIOS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = dict(scenario(Path(folder)))
    if "--write" in sys.argv:
        write(found)
        return 0
    differ = [line for name in SCENARIOS for line in differences(name, found[name], recorded())]
    sys.stdout.write("\n".join([*differ, f"{len(differ)} differ"]) + "\n")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
