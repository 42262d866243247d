"""Write `docs/distillation.json`, and the tables in `docs/distillation.md`.

Parts of the study may be run weeks apart. Each replaces its own figures and keeps the others. The
outcome of every picture is among them, so that rows of different parts are compared prompt by
prompt.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.loading.weights import hash_files
from afa.provenance import made_from
from afa.statistics import mean_interval, paired_difference
from afa.studies.distillation.parts import Part
from afa.studies.distillation.plan import (
    ANIMALS,
    BASE,
    FULL,
    GUIDED,
    SELF,
    TEACHER,
    TUNED,
    Settings,
    captions_of_test,
    named,
    students,
)
from afa.zoo import EXPERTS, assets

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from afa.statistics import Scores
    from afa.studies.distillation.plan import Student

_FILE, _PAGE = "distillation.json", "distillation.md"
_MIXED = "mixed"
_END = "<!-- end -->"
_SECTION = "<!-- {name}: written by `afa zoo distillation` -->"
_MISSING = "Not measured yet: `afa zoo distillation WORK --docs docs --part {part}`."

Figures = dict[str, Any]


# -- figures ----------------------------------------------------------------------------------


def inputs_of(settings: Settings) -> dict[str, Any]:
    """Everything that the figures depend on besides code: settings, models, prompts of the test."""
    captions = "\n".join(captions_of_test(settings))
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "zoo": hash_files(assets(), sorted(f for f in assets().rglob("*") if f.is_file())),
        "test_prompts": hashlib.sha256(captions.encode()).hexdigest(),
    }


def read_results(docs: Path, settings: Settings) -> Figures:
    """The figures of earlier parts; empty if there are none.

    Raises:
        AfaError: if they are of a study with other settings, models or prompts.
    """
    path = docs / _FILE
    if not path.exists():
        return {"parts": {}, "rows": []}
    found: Figures = read_json(path)
    wanted = inputs_of(settings)
    for part, about in found.get("parts", {"all": {}}).items():
        if about.get("inputs") != wanted:
            raise AfaError(
                "AFA-STUDY-011",
                f"'{path}' has figures of a study with other settings, models or prompts "
                f"(part: {part}). Delete that file to replace all of them.",
            )
    return found


def require_pages(docs: Path, settings: Settings) -> None:
    """Check that figures and tables can be written at the end.

    Raises:
        AfaError: if the page is missing or lacks a mark of a table, or `docs` has figures of other
            inputs.
    """
    _with_tables(docs / _PAGE, tables(read_results(docs, settings)))


def results_of(
    part: Part, output: Path, settings: Settings, work: Path, costs: dict[str, float] | None
) -> Figures:
    """The figures of one part: what it was made from, its students, and all rows.

    Args:
        part: of the study.
        output: folder of its finished comparison.
        settings: of the study.
        work: folder of the study.
        costs: of `afa.studies.distillation.run.costs_of`, if the part measures them.
    """
    report, outcomes = read_json(output / "report.json"), read_outcomes(output / "scores.csv")

    def row(each: Figures, group: str) -> Figures:
        name, measured = each["method"], each["groups"][group]
        return {
            "part": part,
            "method": name,
            "num_seeds": each["num_replicas"],
            **measured["scores"],
            **measured["sets"],
            "expert_calls_per_image": each["expert_calls_per_image"],
            **each["measured"],
            "outcomes": outcomes[name, group],
        }

    about = {
        "made_from": made_from(),
        "inputs": inputs_of(settings),
        "sampling": report["sampling"],
        "guidance": report.get("guidance", {}),
        "groups": report["groups"],
        "students": [_student(student, settings, work) for student in students(settings, part)],
    }
    return {
        "about": about if costs is None else {**about, "costs": costs},
        "rows": [row(each, _MIXED) for each in report["rows"]],
        "own_domain": {name: [row(each, name) for each in report["rows"]] for name in EXPERTS},
    }


def read_outcomes(path: Path) -> dict[tuple[str, str], list[str]]:
    """Whether each picture is right, by method and group: a text of 0 and 1 for each training."""
    found: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            texts = found.setdefault((line["method"], line["group"]), {})
            of_training = texts.setdefault(int(line["replica"]), {})
            number = int(line["prompt_number"])
            assert number not in of_training, "one seed, so one picture of each prompt"
            of_training[number] = str(int(float(line["both"])))
    return {
        key: ["".join(values[n] for n in sorted(values)) for _, values in sorted(trained.items())]
        for key, trained in found.items()
    }


def _student(student: Student, settings: Settings, work: Path) -> Figures:
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
        "bytes": {str(file.relative_to(folder)): file.stat().st_size for file in files},
    }


def with_part(results: Figures, part: Part, found: Figures) -> Figures:
    """Replace the figures of a part, and compare all rows again.

    Args:
        results: figures of all parts; see `read_results`.
        part: the part that is replaced.
        found: its figures; see `results_of`.
    """
    order = list(Part)
    parts = {**results["parts"], part: found["about"]}

    def merged(old: Iterable[Figures], new: Iterable[Figures]) -> list[Figures]:
        rows = [*(row for row in old if row["part"] != part), *new]
        rows.sort(key=lambda row: order.index(row["part"]))
        resamples = found["about"]["inputs"]["settings"]["num_resamples"]
        return [_compared(row, rows, resamples) for row in rows]

    own = results.get("own_domain", {})
    return {
        "parts": {name: parts[name] for name in order if name in parts},
        "rows": merged(results["rows"], found["rows"]),
        "own_domain": {
            name: merged(own.get(name, []), found["own_domain"][name]) for name in EXPERTS
        },
    }


def _compared(row: Figures, rows: list[Figures], num_resamples: int) -> Figures:
    """A row with its differences from its teacher, from the full student and from the expert."""
    part = Part(row["part"])
    full = part if part == Part.TRANSFORMERS else Part.MAIN
    references = {
        "teacher_minus_this": (part, named(part, TEACHER)),
        "distilled_minus_this": (full, named(full, FULL)),
    }
    if row["method"] == SELF:
        references["expert_minus_this"] = (part, f"expert: {ANIMALS}")
    differences = {}
    for key, (of_part, name) in references.items():
        other = next((r for r in rows if (r["part"], r["method"]) == (of_part, name)), None)
        if other is not None and name != row["method"]:
            paired = paired_difference(_scores(other), _scores(row), num_resamples)
            found = asdict(paired)
            differences[key] = {**found.pop("difference"), **found}
    kept = {key: value for key, value in row.items() if not key.endswith("_minus_this")}
    return {**kept, **differences}


def _scores(row: Figures) -> Scores:
    """The outcomes of a row, [trainings, prompts]."""
    return np.array([[float(digit) for digit in text] for text in row["outcomes"]])


# -- page -------------------------------------------------------------------------------------


def write_pages(docs: Path, settings: Settings, part: Part, found: Figures) -> None:
    """Write the figures of a part, and replace the tables of the page.

    Args:
        docs: folder of the page and of the figures.
        settings: of the study.
        part: of the study.
        found: its figures; see `results_of`.

    Raises:
        AfaError: if the page lacks a mark of a table, or `docs` has figures of other settings.
    """
    results = with_part(read_results(docs, settings), part, found)
    text = _with_tables(docs / _PAGE, tables(results))
    write_atomic(docs / _FILE, json.dumps(results, indent=1) + "\n")
    write_atomic(docs / _PAGE, text)


def _with_tables(path: Path, made: dict[str, str]) -> str:
    """The text of the page with these tables."""
    if not path.is_file():
        raise AfaError(
            "AFA-STUDY-012",
            f"'{path}' is missing. Pass the folder docs of the repository as --docs.",
        )
    text = path.read_text(encoding="utf-8")
    for name, table in made.items():
        start = _SECTION.format(name=name)
        before, mark, rest = text.partition(start)
        if not mark or _END not in rest:
            raise AfaError(
                "AFA-STUDY-009", f"'{path}' lacks the mark '{start}'. Restore the page from git."
            )
        text = f"{before}{start}\n\n{table}\n\n{_END}{rest.partition(_END)[2]}"
    return text


def tables(results: Figures) -> dict[str, str]:
    """The tables of the page, by name."""
    made = {
        "comparison": (Part.MAIN, _comparison),
        "curves": (Part.VARIANTS, _curves),
        "self": (Part.VARIANTS, _self),
        "transformers": (Part.TRANSFORMERS, _transformers),
        "budgets": (Part.BUDGET, _budgets),
    }
    return {
        name: table(results) if part in results["parts"] else _MISSING.format(part=part)
        for name, (part, table) in made.items()
    }


def _comparison(results: Figures) -> str:
    rows = [row for row in results["rows"] if row["part"] == Part.MAIN]
    rows += [row for row in results["rows"] if row["method"] == TUNED]
    return _table(results, rows)


def _transformers(results: Figures) -> str:
    return _table(results, [row for row in results["rows"] if row["part"] == Part.TRANSFORMERS])


def _table(results: Figures, rows: Iterable[Figures]) -> str:
    """A table of rows with all metrics; seconds are in terms of the base of the same part."""
    lines = [
        "| row | seeds | both right | teacher minus this | animals | food | things | CLIP-T | FID "
        "| CMMD | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        part, name = Part(row["part"]), row["method"]
        base = _find(results["rows"], part, named(part, BASE))
        time = row["seconds_per_image"] / base["seconds_per_image"]
        own = (_find(results["own_domain"][domain], part, name) for domain in EXPERTS)
        cells = [
            name.removeprefix(named(part, "")),
            str(row["num_seeds"]),
            _interval(row["both"]),
            _signed(row.get("teacher_minus_this")),
            *(f"{each['both']['mean']:.2f}" for each in own),
            f"{row['clip_t']['mean']:.3f}",
            f"{row['fid']['mean']:.2f}",
            f"{row['cmmd']['mean']:.3f}",
            f"{time:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _curves(results: Figures) -> str:
    lines = [
        "| row | pictures drawn | steps | file | both right | teacher minus this "
        "| loss on held-out pictures |",
        "|---|---|---|---|---|---|---|",
    ]
    planned = [
        (part, student)
        for part, about in results["parts"].items()
        for student in about["students"]
        if part in (Part.MAIN, Part.VARIANTS)
        and not student["seed"]
        and student["method"] not in (GUIDED, SELF)
    ]
    for part, student in planned:
        name = student["method"]
        row = _find(results["rows"], part, name)
        # the first training alone, as that of the other rows
        scores = _scores(row)[:1]
        teacher = _scores(_find(results["rows"], part, TEACHER))
        difference = paired_difference(teacher, scores).difference
        cells = [
            name,
            f"{student['num_pictures']:,}",
            f"{student['num_steps']:,}",
            f"{max(student['bytes'].values()) / 1e6:.1f} MB",
            _interval(asdict(mean_interval(scores, is_outcome=True))),
            _signed(asdict(difference)),
            f"{student['validation_loss'][-1]['loss']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _self(results: Figures) -> str:
    lines = ["| row | both right, animals | expert minus this |", "|---|---|---|"]
    for name in (f"expert: {ANIMALS}", SELF):
        row = _find(results["own_domain"][ANIMALS], Part.VARIANTS, name)
        lines.append(
            f"| {name} | {_interval(row['both'])} | {_signed(row.get('expert_minus_this'))} |"
        )
    return "\n".join(lines)


def _budgets(results: Figures) -> str:
    costs = results["parts"][Part.BUDGET]["costs"]
    return "\n".join(
        [
            "| part | seconds on one core |",
            "|---|---|",
            f"| training the teacher's aggregators | {costs['teacher_seconds']:,.0f} |",
            f"| recording its predictions | {costs['recording_seconds']:,.0f} |",
            f"| training the student | {costs['student_seconds']:,.0f} |",
            f"| together | {costs['total_seconds']:,.0f} |",
            f"| {TUNED}: {costs['tuned_base_steps']:,.0f} steps "
            f"| {costs['tuned_base_seconds']:,.0f} |",
        ]
    )


def _find(rows: Iterable[Figures], part: Part, name: str) -> Figures:
    return next(row for row in rows if (row["part"], row["method"]) == (part, name))


def _interval(score: Figures) -> str:
    return f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _signed(found: Figures | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
