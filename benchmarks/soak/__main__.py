"""Draw and train repeatedly in one process: do memory and descriptors grow?

python -m benchmarks.soak --minutes 60 --output FOLDER  # exit code 1 if something has grown
python -m benchmarks.soak --judge FOLDER                # judge a soak test that was stopped
python -m benchmarks.soak --page FOLDER --docs docs     # copy its plot and figures to the docs
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.soak.loop import WORK, conclude, soak
from benchmarks.soak.page import publish

if TYPE_CHECKING:
    from benchmarks.soak.loop import Work


def main() -> int:
    """Run the command; return 1 if something has grown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="maximum number of rounds")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--only", nargs="*", help="only these parts of a round, to find what grows")
    parser.add_argument("--judge", type=Path, help="judge the records in this folder again")
    parser.add_argument("--page", type=Path, help="copy the plot and the figures from this folder")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="the folder to copy them to"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)  # MODULE:FUNCTION, for tests
    arguments = parser.parse_args()
    if arguments.page is not None:
        publish(arguments.page, arguments.docs)
        return 0
    if arguments.judge is not None:
        return int(not conclude(arguments.judge).is_flat)
    faulthandler.enable()  # prints a traceback if the process crashes
    output = arguments.output.absolute()
    if arguments.work is not None:
        module, _, name = arguments.work.partition(":")
        work = getattr(importlib.import_module(module), name)
    else:
        work = real_work(output, arguments.only)
    return int(not soak(work, output, arguments.minutes, arguments.rounds).is_flat)


def real_work(output: Path, only: list[str] | None) -> Work:
    """Return the rounds of real work, with all files written to the measured folder."""
    work = output / WORK
    shutil.rmtree(work, ignore_errors=True)  # files of a killed run
    scratch = work / "scratch"
    scratch.mkdir(parents=True)
    # set before the libraries read them
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "XDG_CACHE_HOME": str(work / "cache"),
        "TMPDIR": str(scratch),
    }
    from benchmarks.soak.reads import count_reads

    count_reads()
    from afa.machine.quiet import quieten, quieten_loading

    quieten()
    quieten_loading()
    from benchmarks.soak.work import Rounds

    return Rounds(work / "fixtures", only)


if __name__ == "__main__":
    sys.exit(main())
