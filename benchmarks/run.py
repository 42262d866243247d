"""Run all benchmarks and write their page, or check ratios against the committed ones.

    python -m benchmarks.run                       # everything: an hour; docs/benchmarks.{json,md}
    python -m benchmarks.run --only step picture   # some parts; the rest of the page stays
    python -m benchmarks.run --check               # measure a few ratios again and compare them
    python -m benchmarks.run --page                # write the page from the committed figures

Every part names the commit at which it was measured. The quality studies have their own commands.
`--gpu OUT.json` adds the results of `benchmarks.gpu` from another machine.
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
    "distilling": ["benchmarks.distilling"],
    "drafting": ["benchmarks.drafting"],
    "app": ["benchmarks.app"],
}
#: sizes that `--check` measures again; few, so that it takes minutes
CHECKED_SIZES = ("zoo, (32, 96)", "(64, 128, 256)")
TOLERANCE = 0.15


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the page without measuring")
    parser.add_argument("--gpu", type=Path, help="add the results of benchmarks.gpu to the page")
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
    """Run a benchmark and parse the JSON that it prints."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout[done.stdout.index("[") :])


def check(kept: dict[str, Any]) -> int:
    """Measure some ratios again; return 1 if one has grown by more than the tolerance."""
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
