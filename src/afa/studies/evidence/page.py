"""The page of the evidence, written from the committed outcomes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import read_text, write_atomic
from afa.studies.evidence.analysis import Outcomes
from afa.studies.evidence.figures import (
    SERIES,
    draw_answer,
    draw_experts,
    draw_fronts,
    lines_of_data,
    lines_of_worlds,
)
from afa.studies.evidence.parts import Experiment
from afa.studies.evidence.rows import AFA, PREDICTIONS, at_steps
from afa.studies.evidence.settings import WORLDS_OF

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.statistics import Interval
    from afa.studies.evidence.analysis import Compared
    from afa.studies.evidence.figures import Lines
    from afa.studies.evidence.settings import EvidenceSettings

PAGE, FOLDER = "evidence.md", "evidence"
_BEGIN, _END = "<!-- begin {name} -->", "<!-- end {name} -->"
_SETS = ("fid", "kid", "cmmd")
#: the paper's claims that a row can speak of: the claim, AFA's rival, and what would support it
CLAIMS = (
    ("adaptive fusion beats the best static merge", "best merge"),
    ("fusing blocks beats fusing predictions only", PREDICTIONS),
    ("weights need the place", "AFA without place"),
    ("weights need the timestep", "AFA without timestep"),
    ("weights need the prompt", "AFA without prompt"),
)
#: few steps suffice if more of them do not help
FEW_STEPS = ("few denoising steps suffice", at_steps(20))


def read_all(docs: Path, settings: EvidenceSettings) -> dict[tuple[Experiment, str], Outcomes]:
    """The outcomes of all finished tests, by experiment and world."""
    found = {}
    for experiment, worlds in WORLDS_OF.items():
        for world in worlds:
            path = docs / FOLDER / f"{experiment}-{world}.json"
            if path.exists():
                found[experiment, world] = Outcomes.read(
                    path, settings.margin, settings.num_resamples
                )
    return found


def write_page(docs: Path, settings: EvidenceSettings) -> None:
    """Replace the tables between the marks of the page, and draw its figures.

    Args:
        docs: folder with `evidence.md` and the outcomes in `evidence`.
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
    write_atomic(docs / PAGE, text)


def _figures(
    found: Mapping[tuple[Experiment, str], Outcomes], images: Path
) -> Iterator[tuple[str, list[str]]]:
    """Draw what can be drawn; the figures by the names of their marks."""
    if draw_answer(found, images / "evidence-answer.png"):
        text = "Right mixed prompts over divergence, private objects and amount of data."
        yield "answer", [f"![{text}](images/evidence-answer.png)"]
    if (main := found.get((Experiment.MAIN, "main"))) is not None:
        draw_fronts(main, images / "evidence-fronts.png")
        text = "Right mixed prompts of all rows over training and over expert calls."
        yield "fronts", [f"![{text}](images/evidence-fronts.png)"]
    if draw_experts(found, images / "evidence-experts.png"):
        text = "Right mixed prompts over the number of experts."
        yield "experts-figure", [f"![{text}](images/evidence-experts.png)"]


def _sections(
    found: Mapping[tuple[Experiment, str], Outcomes],
) -> Iterator[tuple[str, list[str]]]:
    """The tables of all tests, and of the claims, by the names of their marks."""
    for (experiment, world), outcomes in found.items():
        if experiment in (Experiment.MAIN, Experiment.PRIVATE):
            yield f"{experiment}-{world}", rows_table(outcomes)
            yield f"{experiment}-{world}-own", own_table(outcomes)
    if (main := found.get((Experiment.MAIN, "main"))) is not None:
        yield "claims", claims_table(main)
        yield "sets", sets_table(main)
        yield "sentences", [f"- {sentence}" for sentence in sentences(main)]
    for experiment, head in SERIES.items():
        series = [found[experiment, w] for w in WORLDS_OF[experiment] if (experiment, w) in found]
        if series:
            yield str(experiment), lines_table(lines_of_worlds(series, experiment), head)
    if (data := found.get((Experiment.DATA, "main"))) is not None:
        yield "data", lines_table(lines_of_data(data), "row; different pictures in the data")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def rows_table(outcomes: Outcomes, subject: str = AFA) -> list[str]:
    """All rows, the best first: mixed prompts by group, the difference from AFA, and budgets."""
    groups = outcomes.mixed
    order = sorted(outcomes.rows, key=lambda row: -float(outcomes.scores(row, groups).mean()))
    head = ["row", *groups, f"minus {subject}", "says", "calls", "trained on", "seeds"]
    return _table(head, (_cells(outcomes, row, subject) for row in order))


def _cells(outcomes: Outcomes, row: str, subject: str) -> list[str]:
    groups, about = outcomes.mixed, outcomes.rows[row]
    cells = [str(outcomes.mean(row, [group])) for group in groups]
    difference, says = "", ""
    if row != subject and subject in outcomes.rows:
        compared = outcomes.compared(row, subject, groups)
        difference, says = signed(compared.paired.difference), compared.verdict
    calls, total = about["expert_calls"], outcomes.total(row)
    return [
        row,
        *cells,
        difference,
        says,
        "" if calls is None else f"{calls:.0f}",
        "unknown" if total is None else f"{total:,}",
        str(len(about["outcomes"]["both"])),
    ]


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
        listed = outcomes.rows[row]["sets"][name]
        mean = sum(each["value"] for each in listed) / len(listed)
        low, high = (sum(each[end] for each in listed) / len(listed) for end in ("low", "high"))
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"

    def cmmd(row: str) -> float:
        listed = outcomes.rows[row]["sets"]["cmmd"]
        return sum(each["value"] for each in listed) / len(listed)

    real = ["real scenes", *(f"{outcomes.content['real'][name]:.3g}" for name in _SETS)]
    rows = ([row, *(cell(row, name) for name in _SETS)] for row in sorted(outcomes.rows, key=cmmd))
    return _table(["row", *(name.upper() for name in _SETS)], [real, *rows])


def lines_table(lines: Lines, head: str) -> list[str]:
    """The lines of a figure as a table; see `afa.studies.evidence.figures`."""
    places = sorted({place for points in lines.values() for place, _ in points})
    rows = []
    for name, points in lines.items():
        at = dict(points)
        rows.append([name, *(str(at[place]) if place in at else "" for place in places)])
    titles = [f"{place:,.3g}" if place < 1 else f"{place:,.0f}" for place in places]
    return _table([head, *titles], rows)


def claims_table(outcomes: Outcomes) -> list[str]:
    """The paper's claims: the row that each is about, and what this study says of it."""

    def row(claim: str, rival: str) -> list[str]:
        name = outcomes.best_merge if rival == "best merge" else rival
        if name not in outcomes.rows:
            return [claim, name, "", "not measured"]
        compared = outcomes.compared(AFA, name, outcomes.mixed)
        return [claim, name, signed(compared.paired.difference), _holds(compared)]

    rows = [row(claim, rival) for claim, rival in CLAIMS]
    claim, more = FEW_STEPS
    if more in outcomes.rows:
        compared = outcomes.compared(AFA, more, outcomes.mixed)
        says = {"below": "does not hold", "not told apart": "cannot be told"}
        rows.append(
            [claim, more, signed(compared.paired.difference), says.get(compared.verdict, "holds")]
        )
    else:
        rows.append([claim, more, "", "not measured"])
    return _table(["claim of the paper", "row", "AFA minus this", "here"], rows)


def _holds(compared: Compared) -> str:
    return {
        "above": "holds",
        "below": "the opposite holds",
        "equivalent": "does not hold: equivalent",
        "not told apart": "cannot be told",
    }[compared.verdict]


def sentences(outcomes: Outcomes) -> list[str]:
    """What the test says of AFA against every row, what speaks against it first."""
    groups = outcomes.mixed
    compared = {row: outcomes.compared(row, AFA, groups) for row in outcomes.rows if row != AFA}
    ours = outcomes.mean(AFA, groups)
    said = []
    for verdict, text in (
        ("above", "significantly above AFA"),
        ("equivalent", "equivalent to AFA (margin 0.05)"),
        ("not told apart", "not told apart from AFA"),
        ("below", "significantly below AFA"),
    ):
        rows = [row for row, each in compared.items() if each.verdict == verdict]
        rows.sort(key=lambda row: -float(outcomes.scores(row, groups).mean()))
        if rows:
            listed = "; ".join(f"{row} {outcomes.mean(row, groups)}" for row in rows)
            said.append(f"On pairs of two experts, AFA draws {ours}. **{text}:** {listed}.")
    own = outcomes.own
    worst = min(own, key=lambda group: float(outcomes.scores(AFA, [group]).mean()))
    expert = f"expert: {worst}"
    if expert in outcomes.rows:
        difference = outcomes.compared(AFA, expert, [worst])
        said.append(
            f"On its own prompts, AFA's worst domain is {worst}: {outcomes.mean(AFA, [worst])}, "
            f"its expert {outcomes.mean(expert, [worst])}; AFA is {difference.verdict} "
            f"({signed(difference.paired.difference)})."
        )
    for name in _SETS:
        nearer = [
            row
            for row in outcomes.rows
            if _distance(outcomes, row, name) < _distance(outcomes, AFA, name)
        ]
        said.append(
            f"By {name.upper()}, {len(nearer)} of {len(outcomes.rows) - 1} rows are nearer to real "
            f"scenes than AFA{': ' + ', '.join(sorted(nearer)) if nearer else ''}."
        )
    return said


def _distance(outcomes: Outcomes, row: str, name: str) -> float:
    listed = outcomes.rows[row]["sets"][name]
    total: float = sum(each["value"] for each in listed)
    return total / len(listed)
