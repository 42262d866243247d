"""Fuzz the readers with atheris, within a budget, from the kept corpus on.

    python -m fuzz.run --seconds 300              # all targets share the time
    python -m fuzz.run --seconds 60 recipes       # some
    python -m fuzz.run --minimise                 # keep of the corpus what is needed

Inputs that reach new code are kept in fuzz/corpus; what crashes a reader goes to fuzz/findings and
fails the run. With --report FILE executions, coverage and findings are written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS, FINDINGS = HERE / "corpus", HERE / "findings"
#: bytes of an input, seconds that a reader may take for one, and MB of memory
_MAX_LENGTH, _TIMEOUT, _MEMORY = 4096, 20, 4096
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)")
_COUNTERS = re.compile(r"Loaded \d+ modules\s+\((\d+) inline 8-bit counters\)")


def fuzz_one(target: str, arguments: list[str]) -> None:
    """In a process of its own: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["afa", "yaml", "json"]):
        from fuzz.targets import feed

    def one_input(data: bytes) -> None:
        feed(target, data)

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def run(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz a target for some time."""
    corpus, found = CORPUS / target, FINDINGS / target
    found.mkdir(parents=True, exist_ok=True)
    before = {file.name for file in found.iterdir()}
    done = _libfuzzer(
        target,
        f"-max_total_time={seconds}",
        f"-artifact_prefix={found}/",
        str(corpus),
    )
    counters, end = _COUNTERS.search(done), _DONE.search(done)
    executions, covered, features, kept = map(int, end.groups()) if end else (0, 0, 0, 0)
    total = int(counters[1]) if counters else 0
    new = sorted(file.name for file in found.iterdir() if file.name not in before)
    if not end and not new:
        raise SystemExit(f"the fuzzer did not come to its end:\n{done[-3000:]}")
    return {
        "target": target,
        "seconds": seconds,
        "executions": executions,
        "covered": covered,
        "counters": total,
        "features": features,
        "corpus": kept,
        "findings": new,
    }


def minimise(target: str) -> None:
    """Keep of a target's corpus the fewest inputs that reach the same."""
    smaller = CORPUS / f".{target}"
    smaller.mkdir()
    _libfuzzer(target, "-merge=1", str(smaller), str(CORPUS / target))
    shutil.rmtree(CORPUS / target)
    smaller.rename(CORPUS / target)


def _libfuzzer(target: str, *options: str) -> str:
    limits = (f"-max_len={_MAX_LENGTH}", f"-timeout={_TIMEOUT}", f"-rss_limit_mb={_MEMORY}")
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.run", "--one", target, "--", *limits, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.stdout


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        fuzz_one(asked.targets[0], asked.targets[1:])
        return
    targets = asked.targets or sorted(folder.name for folder in CORPUS.iterdir())
    if asked.minimise:
        for target in targets:
            minimise(target)
        return
    results = []
    for target in targets:
        found = run(target, max(asked.seconds // len(targets), 1))
        results.append(found)
        share = found["covered"] / max(found["counters"], 1)
        print(  # noqa: T201
            f"{target:16} {found['executions']:>9,} executions  {found['covered']:>6,} of "
            f"{found['counters']:,} counters ({share:.1%})  {len(found['findings'])} findings",
            flush=True,
        )
    if asked.report is not None:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        asked.report.write_text(json.dumps({"date": date, "targets": results}, indent=1) + "\n")
    if any(found["findings"] for found in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
