"""Repeat rounds of work until the time is over, and measure the process after each."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.soak.curves import curves_of
from benchmarks.soak.sampling import anonymous, look, trim, watch_errors
from benchmarks.soak.verdict import MIN_ROUNDS, MIN_WARM_UP, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    #: runs a round in a folder, which is removed afterwards; returns the seconds of its parts
    Work = Callable[[int, Path], Mapping[str, float]]

LINES, SUMMARY, PLOT = "rounds.jsonl", "soak.json", "soak.png"
WORK = "work"
_ENOUGH = MIN_WARM_UP + MIN_ROUNDS


def soak(work: Work, output: Path, minutes: float, max_rounds: int | None = None) -> Verdict:
    """Run rounds for some time and judge the measurements.

    A line of JSON is written to the output folder after each round, and a plot and a summary at the
    end.

    Args:
        work: Runs one round.
        output: A folder; the files of an earlier soak test are replaced.
        minutes: No round begins later, if there are enough rounds for a verdict.
        max_rounds: The maximum number of rounds.
    """
    folder, lines = output / WORK, output / LINES
    folder.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    watch_errors()
    began, number = time.monotonic(), 0
    while number < _ENOUGH or time.monotonic() - began < 60 * minutes:
        if number == max_rounds:
            break
        parts = _round(work, number, folder)
        number += 1
        line = {
            "round": number,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 2),
            **look(folder).as_json(),
            "parts": {name: round(seconds, 2) for name, seconds in parts.items()},
        }
        with lines.open("a") as file:  # line by line: a killed run keeps all earlier lines
            file.write(json.dumps(line) + "\n")
        _say(line)
    return conclude(output, _after_trim())


def _round(work: Work, number: int, folder: Path) -> Mapping[str, float]:
    place = Path(tempfile.mkdtemp(dir=folder, prefix="round-"))
    try:
        return work(number, place)
    finally:
        shutil.rmtree(place)


def conclude(output: Path, after_trim: Mapping[str, int] | None = None) -> Verdict:
    """Judge the records in a folder, and write the summary and the plot there.

    Args:
        output: The output folder of a finished or stopped `soak`.
        after_trim: Anonymous memory before and after the C library released unused memory.
    """
    rows = [json.loads(line) for line in (output / LINES).read_text().splitlines()]
    verdict = judge_rows(rows)
    summary = {**summarise(rows, verdict), "trimmed": after_trim}
    if after_trim is None and (output / SUMMARY).exists():  # only the process itself can measure it
        before = json.loads((output / SUMMARY).read_text())
        summary |= {key: before[key] for key in ("trimmed", "commit")}
    (output / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    from benchmarks.soak.drawing import draw

    draw(rows, verdict, output / PLOT)
    for said in verdict.lines():
        sys.stdout.write(f"{said}\n")
    return verdict


def judge_rows(rows: list[dict[str, Any]]) -> Verdict:
    """Judge records as they are in the file."""
    return judge(curves_of(rows), [row["seconds"] / 3600 for row in rows])


def summarise(rows: list[dict[str, Any]], verdict: Verdict) -> dict[str, Any]:
    """Summarise a soak test as JSON."""
    from afa.provenance import commit, made_from, processor

    last = {key: value for key, value in rows[-1].items() if isinstance(value, int)}
    seconds = rows[-1]["seconds"]
    return {
        "commit": commit(),
        "date": rows[-1]["at"][:10],
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "software": made_from()["software"],
        "minutes": round(seconds / 60, 1),
        "rounds": len(rows),
        "warm_up": verdict.warm_up,
        "is_flat": verdict.is_flat,
        "findings": [finding.as_json() for finding in verdict.findings],
        "last": last,
        "seconds_of_parts": {
            name: round(sum(row["parts"].get(name, 0.0) for row in rows), 1)
            for name in rows[-1]["parts"]
        },
    }


def _after_trim() -> dict[str, int] | None:
    """Measure anonymous memory before and after the C library releases unused memory."""
    before = anonymous()
    return {"before": before, "after": anonymous()} if trim() else None


def _say(line: dict[str, Any]) -> None:
    sizes = {
        "resident": "rss",
        "of it no file's": "anonymous",
        "given out": "allocated",
        "kept": "kept",
    }
    counts = ("objects", "tensors", "fds", "threads", "maps", "deleted", "cached")
    said = [f"{line[name] / 1e6:.2f} MB {what}" for what, name in sizes.items()]
    said += [f"{name} {line[name]:,}" for name in counts]
    sys.stdout.write(f"round {line['round']}, {line['seconds'] / 60:.1f} min: {', '.join(said)}\n")
    sys.stdout.flush()
