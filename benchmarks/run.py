"""All benchmarks, their page, and a check against what is committed.

    python -m benchmarks.run                       # everything: an hour; docs/benchmarks.{json,md}
    python -m benchmarks.run --only step picture   # some of it; the rest of the page stays
    python -m benchmarks.run --check               # a few ratios again, against the committed ones

Every part says at which commit it was measured. The studies of quality have commands of their own;
what `benchmarks.gpu` measured on another machine is put on the page with `--gpu OUT.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import page

ROOT = Path(__file__).parent.parent
PARTS = {
    "step": ["benchmarks.step"],
    "picture": ["benchmarks.picture"],
    "startup": ["benchmarks.startup"],
    "hashing": ["benchmarks.hashing"],
    "size": ["benchmarks.size"],
    "streaming": ["benchmarks.streaming"],
    "scaling": ["benchmarks.scaling"],
    "training": ["benchmarks.training", "--json"],
    "app": ["benchmarks.app"],
}
#: what `--check` measures again; few cells, so that it is done in minutes
CHECKED_SIZES = ("zoo, (32, 96)", "(64, 128, 256)")
TOLERANCE = 0.15


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the page anew, measure nothing")
    parser.add_argument("--gpu", type=Path, help="put what benchmarks.gpu wrote on the page")
    arguments = parser.parse_args()
    if arguments.gpu is not None:
        page.record_gpu(arguments.gpu)
        return
    if arguments.check:
        sys.exit(check(page.committed()))
    for name in () if arguments.page else arguments.only:
        page.record(name, run(*PARTS[name]))
    page.write_page()


def run(module: str, *options: str) -> Any:
    """What a benchmark prints, as JSON."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout[done.stdout.index("[") :])


def check(kept: dict[str, Any]) -> int:
    """Measure some ratios again; 1 if one has grown by more than the tolerance."""
    committed = {
        (cell["size"], shape): spread["median"]
        for cell in kept["step"]["results"]
        if (cell["num_experts"], cell["latent"], cell["dtype"]) == (3, 32, "float32")
        and not cell["compiled"]
        for shape, spread in cell["ratios"].items()
    }
    found = run("benchmarks.step", "--only-usual", "--sizes", *CHECKED_SIZES)
    worse = False
    for cell in found:
        for shape, spread in cell["ratios"].items():
            before, now = committed[cell["size"], shape], spread["median"]
            is_worse = now > before * (1 + TOLERANCE)
            worse |= is_worse
            verdict = "WORSE" if is_worse else "as committed"
            sys.stdout.write(
                f"{cell['size']}, {shape}: {now:.3f} of the experts' time, committed "
                f"{before:.3f}: {verdict} (tolerance {TOLERANCE:.0%})\n"
            )
    return int(worse)


if __name__ == "__main__":
    main()
