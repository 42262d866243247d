"""The page of the evidence, written from the committed outcomes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.drawing.plots import save_figure
from afa.errors import AfaError
from afa.files import read_text, write_atomic
from afa.studies.evidence.analysis import Outcomes
from afa.studies.evidence.parts import Experiment
from afa.studies.evidence.rows import AFA, MERGED, PREDICTIONS, TUNED
from afa.studies.evidence.settings import WORLDS_OF

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.statistics import Interval
    from afa.studies.evidence.analysis import Compared
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
        AfaError: if the page is missing.
    """
    if not (docs / PAGE).is_file():
        raise AfaError(
            "AFA-STUDY-017", f"'{docs / PAGE}' is missing; its tables are replaced. Restore it."
        )
    found = read_all(docs, settings)
    text = read_text(docs / PAGE, 1_000_000)
    for name, lines in _sections(found):
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        if begin not in text or end not in text:
            continue
        before, after = text.split(begin)[0], text.split(end)[1]
        text = "\n".join([before + begin, "", *lines, "", end + after])
    write_atomic(docs / PAGE, text)
    for experiment, axis in (
        (Experiment.DIVERGENCE, "divergence"),
        (Experiment.EXPERTS, "experts"),
    ):
        series = [found[experiment, w] for w in WORLDS_OF[experiment] if (experiment, w) in found]
        if len(series) > 1:
            draw_series(series, axis, docs / "images" / f"evidence-{experiment}.png")
    if (main := found.get((Experiment.DATA, "main"))) is not None:
        draw_data(main, docs / "images" / "evidence-data.png")


def _sections(
    found: Mapping[tuple[Experiment, str], Outcomes],
) -> Iterator[tuple[str, list[str]]]:
    """The tables of all tests, and of the claims, by the names of their marks."""
    for (experiment, world), outcomes in found.items():
        yield f"{experiment}-{world}", rows_table(outcomes)
        yield f"{experiment}-{world}-own", own_table(outcomes)
    if (main := found.get((Experiment.MAIN, "main"))) is not None:
        yield "claims", claims_table(main)
        yield "sets", sets_table(main)
        yield "sentences", [f"- {sentence}" for sentence in sentences(main)]


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
    calls = about["expert_calls"]
    return [
        row,
        *cells,
        difference,
        says,
        "" if calls is None else f"{calls:.0f}",
        f"{outcomes.total(row):,}",
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


def best_merge_of(outcomes: Outcomes) -> str:
    """The merge that was best on tuning prompts."""
    merges = {
        row: each["score"]
        for row, each in outcomes.content["rivals"].items()
        if "merge" in each["method"]
    }
    return max(merges, key=lambda row: merges[row])


def claims_table(outcomes: Outcomes) -> list[str]:
    """The paper's claims: the row that each is about, and what this study says of it."""

    def row(claim: str, rival: str) -> list[str]:
        name = best_merge_of(outcomes) if rival == "best merge" else rival
        if name not in outcomes.rows:
            return [claim, name, "", "not measured"]
        compared = outcomes.compared(AFA, name, outcomes.mixed)
        return [claim, name, signed(compared.paired.difference), _holds(compared)]

    return _table(
        ["claim of the paper", "row", "AFA minus this", "here"],
        (row(claim, rival) for claim, rival in CLAIMS),
    )


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


# -- figures ----------------------------------------------------------------------------------


def draw_series(series: Sequence[Outcomes], axis: str, path: Path) -> None:
    """Draw quality over the worlds of an experiment: their divergence, or their experts."""

    def place(outcomes: Outcomes) -> float:
        if axis == "experts":
            return len(outcomes.own)
        values = outcomes.content["divergence"].values()
        return float(sum(values) / len(values))

    merge = {id(each): best_merge_of(each) for each in series}
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for outcomes in series:
        for row in outcomes.rows:
            kind = _kind(row, merge[id(outcomes)])
            if kind is not None:
                found = outcomes.mean(row, outcomes.mixed)
                lines.setdefault(kind, []).append((place(outcomes), found))
    labels = {
        "divergence": "norm of the experts' difference from the base, by the base's",
        "experts": "number of experts",
    }
    _draw(lines, labels[axis], path, is_log=axis == "divergence")


def _kind(row: str, merge: str) -> str | None:
    """The line of a row in figures; None for rows that figures leave out."""
    if row in (AFA, PREDICTIONS, "base", "oracle mask"):
        return row
    if row == merge:
        return "best merge"
    for kind in (TUNED, MERGED):
        if row.startswith(kind):
            return kind
    return None


def draw_data(outcomes: Outcomes, path: Path) -> None:
    """Draw quality over the number of different pictures in the training data."""
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for row in outcomes.rows:
        kind = next(
            (k for k in (AFA, PREDICTIONS, TUNED, MERGED) if row.startswith(f"{k} (")), None
        )
        if kind is not None and "pictures" in row:
            number = int(row.split(", ")[-1].split(" pictures")[0].replace(",", ""))
            lines.setdefault(kind, []).append((number, outcomes.mean(row, outcomes.mixed)))
    _draw(lines, "different pictures in the training data", path, is_log=True)


def _draw(
    lines: Mapping[str, Sequence[tuple[float, Interval]]], label: str, path: Path, *, is_log: bool
) -> None:
    from matplotlib.figure import Figure

    if not lines:
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis: Any = figure.subplots()
    for name, points in lines.items():
        ordered = sorted(points, key=lambda point: point[0])
        means = [each.mean for _, each in ordered]
        errors = [
            [each.mean - each.low for _, each in ordered],
            [each.high - each.mean for _, each in ordered],
        ]
        axis.errorbar([x for x, _ in ordered], means, errors, marker="o", capsize=2, label=name)
    if is_log:
        axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("both objects right")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
