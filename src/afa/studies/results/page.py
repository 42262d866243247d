"""The page of results, written from the committed outcomes alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import read_text, write_atomic
from afa.studies.results.analysis import SETS, Outcomes
from afa.studies.results.figures import (
    MAIN,
    SERIES,
    draw_answer,
    draw_experts,
    draw_fronts,
    lines_of_data,
    lines_of_worlds,
)
from afa.studies.results.kept import path_of
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import AFA, ORACLE, PREDICTIONS, REAL
from afa.studies.results.settings import WORLDS_OF
from afa.studies.results.summary import hours, not_measured, summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from afa.statistics import Interval
    from afa.studies.results.figures import Found, Lines
    from afa.studies.results.settings import StudySettings

PAGE, SUMMARY, FOLDER = "results.md", "results.json", "results"
_BEGIN, _END = "<!-- begin {name} -->", "<!-- end {name} -->"
#: the paper's claims that a row can speak of, with the row; the first one with the best merge
CLAIMS = {
    "adaptive fusion beats the best static merge": "",
    "fusing blocks beats fusing predictions only": PREDICTIONS,
    "weights need the place": "AFA without place",
    "weights need the timestep": "AFA without timestep",
    "weights need the prompt": "AFA without prompt",
}
FEW_STEPS = "few denoising steps suffice"


def read_all(docs: Path, settings: StudySettings) -> dict[tuple[Experiment, str], Outcomes]:
    """The outcomes of all tests, by experiment and world.

    Tables that compare rows with AFA need its outcomes; a test without them is left out.
    """
    found = {}
    for experiment, worlds in WORLDS_OF.items():
        for world in worlds:
            path = path_of(docs / FOLDER, experiment, world)
            if not path.exists():
                continue
            outcomes = Outcomes.read(path, settings.margin, settings.num_resamples)
            if AFA in outcomes.rows or experiment not in (Experiment.MAIN, Experiment.PRIVATE):
                found[experiment, world] = outcomes
    return found


def write_page(docs: Path, settings: StudySettings) -> None:
    """Replace the tables between the marks of the page, write all figures as JSON, and draw.

    Args:
        docs: folder with `results.md` and the outcomes in `results`.
        settings: of the study.

    Raises:
        AfaError: if the page or one of its marks is missing.
    """
    if not (docs / PAGE).is_file():
        raise AfaError(
            "AFA-STUDY-017", f"'{docs / PAGE}' is missing; its tables are replaced. Restore it."
        )
    found = read_all(docs, settings)
    text = read_text(docs / PAGE, 1_000_000)
    figures = dict(_figures(found, docs / "images"))
    for name, lines in {**dict(_sections(found)), **figures}.items():
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        if begin not in text or end not in text:
            raise AfaError(
                "AFA-STUDY-021", f"'{docs / PAGE}' lacks the marks of '{name}'. Restore them."
            )
        before, after = text.split(begin)[0], text.split(end)[1]
        text = "\n".join([before + begin, "", *lines, "", end + after])
    write_atomic(docs / SUMMARY, json.dumps(summary(found), indent=1) + "\n")
    write_atomic(docs / PAGE, text)


def _figures(found: Found, images: Path) -> Iterator[tuple[str, list[str]]]:
    """Draw what can be drawn; the figures by the names of their marks."""
    if draw_answer(found, images / "results-answer.png"):
        text = "Right mixed prompts over divergence, private objects and amount of data."
        yield "answer", [f"![{text}](images/results-answer.png)"]
    if (main := found.get(MAIN)) is not None:
        draw_fronts(main, images / "results-fronts.png")
        text = "Right mixed prompts of all rows over training and over expert calls."
        yield "fronts", [f"![{text}](images/results-fronts.png)"]
    if draw_experts(found, images / "results-experts.png"):
        text = "Right mixed prompts over the number of experts."
        yield "experts-figure", [f"![{text}](images/results-experts.png)"]


def _sections(
    found: Found,
) -> Iterator[tuple[str, list[str]]]:
    """The tables of all tests, and of the claims, by the names of their marks."""
    for (experiment, world), outcomes in found.items():
        if experiment in (Experiment.MAIN, Experiment.PRIVATE):
            yield f"{experiment}-{world}", [*rows_table(outcomes), *notes(outcomes)]
            yield f"{experiment}-{world}-own", own_table(outcomes)
            yield f"{experiment}-{world}-says", [f"- {each}" for each in sentences(outcomes)]
    if (main := found.get(MAIN)) is not None:
        yield "claims", claims_table(main)
        yield "edges", edges_list(main)
        yield "sets", sets_table(main)
    for experiment, head in SERIES.items():
        if lines := lines_of_worlds(found, experiment):
            yield str(experiment), lines_table(lines, head)
    if found:
        yield "made", made_table(found)
    if lines := lines_of_data(found):
        yield str(Experiment.DATA), lines_table(lines, "row; different pictures in the data")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def rows_table(outcomes: Outcomes, subject: str = AFA) -> list[str]:
    """All rows, the best first: by group of mixed prompts, the difference from AFA, and budgets.

    The verdicts of each group hold for all of its rows together.
    """
    groups = outcomes.mixed
    order = sorted(outcomes.rows, key=lambda row: -float(outcomes.scores(row, groups).mean()))
    others = [row for row in order if row != subject]
    compared = {group: outcomes.compared(others, subject, [group]) for group in groups}
    of_groups = [title for group in groups for title in (group, f"minus {subject}", "p", "says")]
    head = ["row", *of_groups, "calls", "trained on", "seeds"]

    def cells(row: str) -> Iterator[str]:
        yield row
        for group in groups:
            yield str(outcomes.mean(row, [group]))
            each = compared[group].get(row)
            if each is None:
                yield from ("", "", "")
                continue
            yield signed(each.paired.difference)
            yield "" if each.verdict == "one training" else f"{each.p_value:.2g}"
            yield each.verdict
        calls, total = outcomes.calls(row), outcomes.total(row)
        yield "" if calls is None else f"{calls:.0f}"
        yield "unknown" if total is None else f"{total:,}"
        yield str(len(outcomes.rows[row]["outcomes"]["both"]))

    return _table(head, (list(cells(row)) for row in order))


def notes(outcomes: Outcomes) -> list[str]:
    """Paragraphs below the table: what cannot be told yet, or cannot be told at all."""
    found = []
    for group in outcomes.mixed:
        if not outcomes.can_be_equivalent(AFA, [group]):
            count = len({*outcomes.clusters(outcomes.places([group])).tolist()})
            text = f"Of the {group} prompts, {count} pairs of objects are too few for `equivalent`."
            found += ["", text]
    missing = not_measured(outcomes)
    return [*found, "", f"Not measured yet: {'; '.join(missing)}."] if missing else found


def made_table(found: Found) -> list[str]:
    """How long each test took, at which commits, and on which machines."""

    def cells(experiment: Experiment, world: str, outcomes: Outcomes) -> Iterator[str]:
        yield from (str(experiment), world, f"{len(outcomes.rows)}")
        yield from (f"{value:.1f}" for value in hours(outcomes).values())
        rows = outcomes.rows.values()
        yield ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
        yield "; ".join(dict.fromkeys(machine for row in rows for machine in row["machine"]))

    head = ["experiment", "world", "rows", "hours: trainings", "hours: pictures"]
    return _table(
        [*head, "commits", "machine"],
        (list(cells(*test, outcomes)) for test, outcomes in found.items()),
    )


def signed(interval: Interval) -> str:
    """A difference and its interval with signs."""
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def own_table(outcomes: Outcomes) -> list[str]:
    """The rows on each expert's own prompts."""
    groups = outcomes.own
    order = sorted(outcomes.rows, key=lambda row: -float(outcomes.scores(row, groups).mean()))
    return _table(
        ["row", *groups],
        ([row, *(str(outcomes.mean(row, [group])) for group in groups)] for row in order),
    )


def sets_table(outcomes: Outcomes) -> list[str]:
    """The distances of all rows from independent real scenes, the nearest first by CMMD."""

    def cell(row: str, name: str) -> str:
        each = outcomes.distance(row, name)
        return f"{each.mean:.3g} [{each.low:.3g}, {each.high:.3g}]"

    def cmmd(row: str) -> float:
        return outcomes.distance(row, "cmmd").mean

    real = ["real scenes", *(f"{outcomes.content['real'][name]:.3g}" for name in SETS)]
    rows = ([row, *(cell(row, name) for name in SETS)] for row in sorted(outcomes.rows, key=cmmd))
    return _table(["row", *(name.upper() for name in SETS)], [real, *rows])


def lines_table(lines: Lines, head: str) -> list[str]:
    """The lines of a figure as a table; see `afa.studies.results.figures`."""
    places = sorted({place for points in lines.values() for place, _ in points})
    rows = []
    for name, points in lines.items():
        at = dict(points)
        rows.append([name, *(str(at[place]) if place in at else "" for place in places)])
    titles = [f"{place:,.3g}" if place < 1 else f"{place:,.0f}" for place in places]
    return _table([head, *titles], rows)


def claims_table(outcomes: Outcomes) -> list[str]:
    """The paper's claims: the row that each is about, and what this study says of it.

    Few steps suffice if more of them are not better.
    """
    claims = {claim: name or outcomes.best_merge for claim, name in CLAIMS.items()}
    named = [row for row in outcomes.content["planned"] if row.startswith(f"{AFA}, ")]
    more = [row for row in named if _calls(outcomes, row) > _calls(outcomes, AFA)]
    if named:
        claims[FEW_STEPS] = max(more, key=lambda row: _calls(outcomes, row)) if more else named[-1]
    measured = {*outcomes.rows} - ({*named} - {*more})
    known = [name for name in claims.values() if name in measured]
    compared = outcomes.compared(known, AFA, outcomes.mixed)
    says = {
        "below": "holds",
        "above": "the opposite holds",
        "equivalent": "does not hold: equivalent",
        "not told apart": "cannot be told",
        "one training": "cannot be told",
    }
    of_steps = {"below": "holds", "above": "does not hold", "equivalent": "holds"}

    def cells(claim: str, name: str) -> list[str]:
        if name not in compared:
            return [claim, name, "", "not measured"]
        verdict = compared[name].verdict
        here = of_steps.get(verdict, says[verdict]) if claim == FEW_STEPS else says[verdict]
        return [claim, name, signed(compared[name].paired.difference), here]

    return _table(
        ["claim of the paper", "row", f"row minus {AFA}", "here"],
        (cells(claim, name) for claim, name in claims.items()),
    )


def _calls(outcomes: Outcomes, row: str) -> float:
    return (outcomes.calls(row) or 0.0) if row in outcomes.rows else 0.0


def edges_list(outcomes: Outcomes) -> list[str]:
    """The settings whose best value is at an end of its grid: a better one may be beyond."""
    chosen = outcomes.content["chosen"]
    found = [
        f"{row}: {', '.join(each['edges'])}"
        for kind in ("rivals", "drawn")
        for row, each in chosen.get(kind, {}).items()
        if each["edges"]
    ]
    rates = {**chosen.get("rates", {}), **chosen.get("developed", {}).get("rows", {})}
    found += [f"{row}: learning rate {e['rate']:g}" for row, e in rates.items() if e["is_edge"]]
    return [f"Settings at an end of their grid: {'; '.join(found) if found else 'none'}."]


def sentences(outcomes: Outcomes) -> list[str]:
    """What the test says of AFA against every row, what speaks against it first."""
    mixed = outcomes.mixed
    of_mixed = [each for group in mixed for each in _of_mixed(outcomes, group)]
    return [*of_mixed, *_of_own(outcomes), *_of_distances(outcomes)]


def _named(outcomes: Outcomes, group: str) -> str:
    """What sentences call a group of mixed prompts."""
    return "pairs of two experts" if len(outcomes.mixed) == 1 else f"{group} pairs"


def _of_mixed(outcomes: Outcomes, group: str) -> Iterator[str]:
    """The verdicts on a group of mixed prompts."""
    others = [row for row in outcomes.rows if row != AFA]
    compared = outcomes.compared(others, AFA, [group])
    ours = outcomes.mean(AFA, [group])
    for verdict, text in (
        ("above", "significantly above AFA"),
        ("equivalent", "equivalent to AFA (margin 0.05)"),
        ("not told apart", "not told apart from AFA"),
        ("one training", "trained once, so nothing is said of them"),
        ("below", "significantly below AFA"),
    ):
        rows = [row for row, each in compared.items() if each.verdict == verdict]
        rows.sort(key=lambda row: -float(outcomes.scores(row, [group]).mean()))
        if rows:
            listed = "; ".join(f"{row} {outcomes.mean(row, [group])}" for row in rows)
            yield f"On {_named(outcomes, group)}, AFA draws {ours}. **{text}:** {listed}."


def _of_own(outcomes: Outcomes) -> Iterator[str]:
    """The verdicts on prompts of one expert, against it and against all rows."""
    others = [row for row in outcomes.rows if row != AFA]
    compared = outcomes.compared(others, AFA, outcomes.mixed)
    for group in outcomes.own:
        expert = f"expert: {group}"
        if expert in outcomes.rows:
            each = outcomes.compared([expert], AFA, [group])[expert]
            yield (
                f"On prompts of {group} alone, AFA draws {outcomes.mean(AFA, [group])}; their "
                f"expert draws {outcomes.mean(expert, [group])}: {each.verdict} "
                f"({signed(each.paired.difference)})."
            )
        # rows that can compete on pairs of two experts, and all that are better here
        own = outcomes.compared(others, AFA, [group])
        above = [row for row in others if own[row].verdict == "above"]
        below = [
            row
            for row in others
            if own[row].verdict == "below" and compared[row].verdict != "below"
        ]
        shown = [
            "; ".join(f"{row} {outcomes.mean(row, [group])}" for row in rows) or "no row"
            for rows in (above, below)
        ]
        yield (
            f"On prompts of {group} alone, significantly above AFA: {shown[0]}. Significantly "
            f"below it, of the rows that are not below it on pairs of two experts: {shown[1]}."
        )


def _of_distances(outcomes: Outcomes) -> Iterator[str]:
    """How many rows are nearer to real scenes, on the first group of mixed prompts."""
    only = "" if len(outcomes.mixed) == 1 else f", on {_named(outcomes, outcomes.mixed[0])}"
    rows = [row for row in outcomes.rows if row not in (AFA, ORACLE, REAL)]
    for name in SETS:
        far = outcomes.distance(AFA, name).mean
        nearer = [row for row in rows if outcomes.distance(row, name).mean < far]
        yield (
            f"By {name.upper()}{only}, {len(nearer)} of {len(rows)} rows are nearer to real "
            f"scenes than AFA{': ' + ', '.join(sorted(nearer)) if nearer else ''}."
        )
