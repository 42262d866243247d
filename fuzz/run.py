"""Fuzz the readers with atheris for a limited time, starting from the corpus.

    python -m fuzz.run --seconds 300              # all targets share the time
    python -m fuzz.run --seconds 60 recipes       # some targets
    python -m fuzz.run --minimise                 # remove redundant inputs from the corpus

Inputs that reach new code are stored in fuzz/corpus. An input that crashes a reader is stored in
fuzz/findings and fails the run. --docs FOLDER writes executions, coverage and findings there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS, FINDINGS = HERE / "corpus", HERE / "findings"
#: limits of one input: bytes, seconds, and MB of memory
_MAX_LENGTH, _TIMEOUT, _MEMORY = 4096, 20, 4096
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)")
#: readers of untrusted files; the report has their coverage by the corpus
READERS = (
    *("loading/trust/headers.py", "loading/trust/folders.py", "policy.py", "recipe.py"),
    *("loading/weights.py", "files.py", "loading/tensor_files.py", "training/data/folder.py"),
)


def fuzz_one(target: str, arguments: list[str]) -> None:
    """Fuzz one target in a separate process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["afa", "yaml"]):
        from fuzz.targets import feed

    def one_input(data: bytes) -> None:
        feed(target, data)

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def run(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz a target for some seconds, and return its statistics."""
    corpus, found = CORPUS / target, FINDINGS / target
    found.mkdir(parents=True, exist_ok=True)
    before = {file.name for file in found.iterdir()}
    done = _libfuzzer(
        target,
        f"-max_total_time={seconds}",
        f"-artifact_prefix={found}/",
        str(corpus),
    )
    end = _DONE.search(done)
    executions, edges, features, kept = map(int, end.groups()) if end else (0, 0, 0, 0)
    new = sorted(file.name for file in found.iterdir() if file.name not in before)
    if not end and not new:
        raise SystemExit(f"The fuzzer ended early:\n{done[-3000:]}")
    return {
        "target": target,
        "seconds": seconds,
        "executions": executions,
        "edges": edges,
        "features": features,
        "corpus": kept,
        "findings": new,
    }


def lines_reached() -> dict[str, float]:
    """Measure the fraction of lines of every reader that the corpus reaches."""
    import coverage

    import afa

    source = Path(afa.__file__).parent
    measure = coverage.Coverage(
        include=[str(source / reader) for reader in READERS], data_file=None
    )
    measure.start()
    from fuzz.targets import TARGETS, feed

    for target in TARGETS:
        for file in sorted((CORPUS / target).iterdir()):
            feed(target, file.read_bytes())
    measure.stop()
    shares = {}
    for reader in READERS:
        _, lines, _, missing, _ = measure.analysis2(str(source / reader))
        shares[reader] = 1 - len(missing) / len(lines)
    return shares


def table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    rows = [
        f"Last run: {report['date']}.",
        "",
        "| target | seconds | executions | edges reached | inputs kept | findings |",
        "|---|---|---|---|---|---|",
    ]
    for found in report["targets"]:
        findings = ", ".join(found["findings"]) or "none"
        rows.append(
            f"| {found['target']} | {found['seconds']} | {found['executions']:,} | "
            f"{found['edges']:,} | {found['corpus']} | {findings} |"
        )
    rows += ["", "Lines of each reader that the corpus reaches, including error branches:", ""]
    rows += ["| file | lines reached |", "|---|---|"]
    rows += [f"| `src/afa/{name}` | {share:.0%} |" for name, share in report["lines"].items()]
    return "\n".join(rows)


def minimise(target: str) -> None:
    """Reduce a target's corpus to small inputs with the same coverage, and the seeds.

    libFuzzer's merge restarts its program, which is Python here. This uses only its inner step,
    which reports the coverage of each input. See FuzzerMerge.h of LLVM for the format of the
    control file.
    """
    inputs = sorted((CORPUS / target).iterdir(), key=lambda file: file.stat().st_size)
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "control"
        control.write_text("\n".join([str(len(inputs)), "0", *map(str, inputs)]) + "\n")
        said = _libfuzzer(target, "-merge_inner=1", f"-merge_control_file={control}")
        reached = {
            int(words[1]): set(words[2:])
            for words in map(str.split, control.read_text().splitlines())
            if words[0] == "FT"
        }
    if reached.keys() != set(range(len(inputs))):
        raise SystemExit(f"Some inputs were not read, so all are kept:\n{said[-3000:]}")
    known: set[str] = set()
    for number, file in enumerate(inputs):
        if reached[number] <= known and not file.name.startswith(("seed", "crash")):
            file.unlink()
        known |= reached[number]


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
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument(
        "--docs", type=Path, help="folder for fuzz.json and a part of reliability.md"
    )
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
        print(  # noqa: T201
            f"{target:16} {found['executions']:>9,} executions  {found['edges']:>5,} edges  "
            f"{found['corpus']:>4} inputs kept  {len(found['findings'])} findings",
            flush=True,
        )
    if asked.docs is not None:
        report = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "targets": results,
            "lines": lines_reached(),
        }
        from tools.parts import write_part  # after the readers are instrumented

        (asked.docs / "fuzz.json").write_text(json.dumps(report, indent=1) + "\n")
        write_part(asked.docs / "reliability.md", "fuzz", table(report))
    if any(found["findings"] for found in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
