"""Write `docs/distillation.json`, and the tables in `docs/distillation.md`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.provenance import made_from
from afa.studies.distillation.plan import (
    FULL,
    GUIDED,
    TEACHER,
    TUNED,
    Settings,
    Student,
    students,
)
from afa.studies.results.page import difference, row_of
from afa.zoo import EXPERTS

if TYPE_CHECKING:
    from pathlib import Path

_MIXED = "mixed"
_END = "<!-- end -->"
_SECTION = "<!-- {name}: written by `afa zoo distillation` -->"


def results_of(work: Path, settings: Settings, costs: dict[str, float]) -> dict[str, Any]:
    """The content of `distillation.json`.

    Args:
        work: folder of the finished study.
        settings: of the study.
        costs: of `afa.studies.distillation.run.costs_of`.
    """
    ours, teacher = (read_json(work / f"report-{name}.json") for name in (FULL, TEACHER))

    def row(each: dict[str, Any], group: str) -> dict[str, Any]:
        found = row_of(ours, each, group)
        found["distilled_minus_this"] = found.pop("afa_minus_this")
        found["teacher_minus_this"] = difference(teacher, each["method"], group)
        return found

    return {
        "made_from": made_from(),
        "settings": asdict(settings),
        "sampling": ours["sampling"],
        "groups": ours["groups"],
        "rows": [row(each, _MIXED) for each in ours["rows"]],
        "own_domain": {name: [row(each, name) for each in ours["rows"]] for name in EXPERTS},
        "costs": costs,
        "students": [_student(student, settings, work) for student in students(settings)],
    }


def _student(student: Student, settings: Settings, work: Path) -> dict[str, Any]:
    """The budget of one student, its validation losses and the size of its files."""
    folder = work / "students" / student.folder
    record, done = read_json(folder / "distill.json"), read_json(folder / "finished.json")
    files = sorted(folder.glob("lora*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
    files = [file for file in files if file.parent.name not in ("checkpoints", "recorded")]
    return {
        "method": student.row,
        "seed": student.seed,
        "num_pictures": student.number or settings.num_trajectories,
        "num_steps": student.steps or settings.num_steps,
        "seconds_per_step": done["seconds_per_step"],
        "validation_loss": record["validation_loss"],
        "bytes": {file.name: file.stat().st_size for file in files},
    }


def write_pages(docs: Path, results: dict[str, Any]) -> None:
    """Write the figures, and replace the tables of the page.

    Raises:
        AfaError: if the page lacks a mark of a table.
    """
    write_atomic(docs / "distillation.json", json.dumps(results, indent=1) + "\n")
    path = docs / "distillation.md"
    text = path.read_text()
    for name, table in tables(results).items():
        start = _SECTION.format(name=name)
        before, found, rest = text.partition(start)
        if not found or _END not in rest:
            raise AfaError(
                "AFA-STUDY-009", f"'{path}' lacks the mark '{start}'. Restore the page from git."
            )
        text = f"{before}{start}\n\n{table}\n\n{_END}{rest.partition(_END)[2]}"
    write_atomic(path, text)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by name."""
    rows = {row["method"]: row for row in results["rows"]}
    return {
        "comparison": _comparison(results, rows),
        "curves": _curves(results, rows),
        "budgets": _budgets(results),
    }


def _comparison(results: dict[str, Any], rows: dict[str, Any]) -> str:
    lines = [
        "| row | seeds | both right | teacher minus this | animals | food | things | CLIP-T | FID "
        "| CMMD | s / picture |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if re.search(r"steps|pictures|rank (4|64)", name):
            continue
        own = " | ".join(
            f"{_of(results['own_domain'][domain], name)['both']['mean']:.2f}" for domain in EXPERTS
        )
        cells = [
            name,
            str(row["num_seeds"]),
            _interval(row["both"]),
            _signed(row["teacher_minus_this"]),
            own,
            f"{row['clip_t']['mean']:.3f}",
            f"{row['fid']['mean']:.2f}",
            f"{row['cmmd']['mean']:.3f}",
            f"{row['seconds_per_image']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _curves(results: dict[str, Any], rows: dict[str, Any]) -> str:
    lines = [
        "| row | pictures drawn | steps | files | both right | loss on held-out pictures |",
        "|---|---|---|---|---|---|",
    ]
    for student in results["students"]:
        if student["seed"] or student["method"] == GUIDED or "itself" in student["method"]:
            continue
        size = max(student["bytes"].values()) / 1e6
        lines.append(
            f"| {student['method']} | {student['num_pictures']:,} | {student['num_steps']:,} | "
            f"{size:.1f} MB | {_interval(rows[student['method']]['both'])} | "
            f"{student['validation_loss'][-1]['loss']:.4f} |"
        )
    return "\n".join(lines)


def _budgets(results: dict[str, Any]) -> str:
    costs = results["costs"]
    return "\n".join(
        [
            "| part | seconds on one core |",
            "|---|---|",
            f"| training the teacher's aggregators | {costs['teacher_seconds']:,.0f} |",
            f"| recording its predictions | {costs['recording_seconds']:,.0f} |",
            f"| training the student | {costs['student_seconds']:,.0f} |",
            f"| together | {costs['total_seconds']:,.0f} |",
            f"| {TUNED}: {costs['tuned_base_steps']:,.0f} steps | "
            f"{costs['tuned_base_steps'] * costs['base_seconds_per_step']:,.0f} |",
        ]
    )


def _of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["method"] == name)


def _interval(score: dict[str, Any]) -> str:
    return f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _signed(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
