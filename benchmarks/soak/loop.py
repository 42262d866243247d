"""Rounds of work until the time is over, and a look at the process after each."""

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

    #: does a round in a folder, which is removed then; gives the seconds of its parts
    Work = Callable[[int, Path], Mapping[str, float]]

LINES, SUMMARY, PLOT = "rounds.jsonl", "soak.json", "soak.png"
WORK = "work"
_ENOUGH = MIN_WARM_UP + MIN_ROUNDS


def soak(work: Work, output: Path, minutes: float, max_rounds: int | None = None) -> Verdict:
    """Do rounds for a time and judge what they leave.

    The output folder gets a line of JSON after each round, and at the end a plot and a summary.

    Args:
        work: a round.
        output: a folder; what an earlier soak has left there is replaced.
        minutes: after which no other round begins, once there are as many as a verdict needs.
        max_rounds: after which none does either.
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
        with lines.open("a") as file:  # a line at a time: whoever is killed leaves all before
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
    """Judge the lines of a folder; writes the summary and the plot beside them.

    Args:
        output: of `soak`, whether it came to its end or not.
        after_trim: anonymous memory before and after the C library gave back what nobody uses.
    """
    rows = [json.loads(line) for line in (output / LINES).read_text().splitlines()]
    verdict = judge_rows(rows)
    summary = {**summarise(rows, verdict), "trimmed": after_trim}
    if after_trim is None and (output / SUMMARY).exists():  # only the process itself can tell
        before = json.loads((output / SUMMARY).read_text())
        summary |= {key: before[key] for key in ("trimmed", "commit")}
    (output / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    from benchmarks.soak.drawing import draw

    draw(rows, verdict, output / PLOT)
    for said in verdict.lines():
        sys.stdout.write(f"{said}\n")
    return verdict


def judge_rows(rows: list[dict[str, Any]]) -> Verdict:
    """The verdict on lines as they stand in the file."""
    return judge(curves_of(rows), [row["seconds"] / 3600 for row in rows])


def summarise(rows: list[dict[str, Any]], verdict: Verdict) -> dict[str, Any]:
    """What there is to say of a soak, as JSON."""
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
    """What there is before and after the C library gives back what it keeps: a diagnosis."""
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
