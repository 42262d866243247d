"""One process that draws and trains over and over: do memory and descriptors stay flat?

python -m benchmarks.soak --minutes 60 --output FOLDER  # ends with 1 if something has grown
python -m benchmarks.soak --judge FOLDER                # of a soak that was stopped
python -m benchmarks.soak --page FOLDER --docs docs     # its plot and figures into the docs
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
    """Do what is asked for; 1 if something has grown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="at the most")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--only", nargs="*", help="these parts of a round, to find what grows")
    parser.add_argument("--judge", type=Path, help="the lines of a folder, again")
    parser.add_argument("--page", type=Path, help="copy the plot and the figures of a folder")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="to where")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # MODULE:FUNCTION, for tests
    arguments = parser.parse_args()
    if arguments.page is not None:
        publish(arguments.page, arguments.docs)
        return 0
    if arguments.judge is not None:
        return int(not conclude(arguments.judge).is_flat)
    faulthandler.enable()  # or a crash would leave nothing to go by
    output = arguments.output.absolute()
    if arguments.work is not None:
        module, _, name = arguments.work.partition(":")
        work = getattr(importlib.import_module(module), name)
    else:
        work = real_work(output, arguments.only)
    return int(not soak(work, output, arguments.minutes, arguments.rounds).is_flat)


def real_work(output: Path, only: list[str] | None) -> Work:
    """Rounds of everything, with all that is written in the folder that is looked at."""
    work = output / WORK
    shutil.rmtree(work, ignore_errors=True)  # what a killed soak has left
    scratch = work / "scratch"
    scratch.mkdir(parents=True)
    # before the libraries read them
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
