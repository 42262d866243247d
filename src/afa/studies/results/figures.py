"""The figures of the page, from the committed outcomes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from afa.drawing.plots import save_figure
from afa.statistics import Interval
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import AFA, DISTILLED, MERGED, ORACLE, PREDICTIONS, TUNED, counted
from afa.studies.results.settings import WORLDS_OF

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from afa.studies.results.analysis import Outcomes

    #: the outcomes of all tests, by experiment and world
    Found = Mapping[tuple[Experiment, str], Outcomes]

#: lines of a figure: places on the horizontal axis, with the share of right pictures
Lines = dict[str, list[tuple[float, Interval]]]
#: the tests of the main experiment and of the curve over data
MAIN, DATA = (Experiment.MAIN, "main"), (Experiment.DATA, "main")
#: experiments that are series of worlds: the head of their tables
SERIES = {
    Experiment.DIVERGENCE: "row; norm of the experts' difference from the base, by the base's",
    Experiment.EXPERTS: "row; number of experts",
}
#: lines in the figures, with one colour each
_LINES = (AFA, PREDICTIONS, "best merge", TUNED, MERGED, DISTILLED, "drafts", "base", ORACLE)


def lines_of_worlds(found: Found, experiment: Experiment) -> Lines:
    """The lines over the worlds of an experiment: their divergence, or their experts.

    The main experiment is the last place on the axis of divergence. Rows that only it has are no
    lines.
    """
    series = [found[experiment, w] for w in WORLDS_OF[experiment] if (experiment, w) in found]
    if not series:
        return {}
    if experiment == Experiment.DIVERGENCE and MAIN in found:
        series.append(found[MAIN])
    kinds = _rows_of(series[0]).keys()
    lines: Lines = {}
    for outcomes in series:
        place = float(len(outcomes.own))
        if experiment == Experiment.DIVERGENCE:
            values = outcomes.content["divergence"].values()
            place = float(sum(values) / len(values))
        for kind, row in _rows_of(outcomes).items():
            if kind in kinds:
                lines.setdefault(kind, []).append((place, outcomes.mean(row, outcomes.mixed)))
    return lines


def lines_of_data(found: Found) -> Lines:
    """The lines over the number of different pictures that the trainings see.

    The last place is the main experiment, whose tuned models are trained as long as AFA.
    """
    outcomes = found.get(DATA)
    if outcomes is None:
        return {}
    lines: Lines = {}
    for row in outcomes.rows:
        kinds = (AFA, PREDICTIONS, TUNED, MERGED)
        kind = next((k for k in kinds if row.startswith(f"{k} (")), None)
        if kind is not None and "pictures" in row:
            number = int(row.split(", ")[-1].split(" pictures")[0].replace(",", ""))
            lines.setdefault(kind, []).append((number, outcomes.mean(row, outcomes.mixed)))
    if (main := found.get(MAIN)) is not None:
        settings, steps = main.content["settings"], main.content["aggregator_steps"]
        seen = float(min(settings["num_pictures"], steps * settings["batch_size"]))
        for kind, row in _rows_of(main).items():
            if kind in lines:
                lines[kind].append((seen, main.mean(row, main.mixed)))
    return lines


def lines_of_groups(outcomes: Outcomes) -> Lines:
    """The lines over the groups of mixed prompts, from 0."""
    lines: Lines = {}
    for kind, row in _rows_of(outcomes).items():
        groups = enumerate(outcomes.mixed)
        lines[kind] = [(float(n), outcomes.mean(row, [group])) for n, group in groups]
    return lines


def _rows_of(outcomes: Outcomes) -> dict[str, str]:
    """The row of each line; tuned models are those that were trained as long as AFA."""
    steps = outcomes.content["aggregator_steps"]
    named = {kind: kind for kind in _LINES}
    named |= {kind: counted(kind, steps) for kind in (TUNED, MERGED)}
    named["best merge"] = outcomes.best_merge
    return {kind: row for kind, row in named.items() if row in outcomes.rows}


# -- drawing ----------------------------------------------------------------------------------


def draw_answer(found: Found, path: Path) -> bool:
    """Draw when which way wins: over divergence, private knowledge, and amount of data.

    Returns: whether there was anything to draw.
    """
    panels: list[tuple[Lines, str, bool, Sequence[str]]] = []
    if lines := lines_of_worlds(found, Experiment.DIVERGENCE):
        panels.append((lines, "norm of the experts' difference from the base", True, ()))
    private = found.get((Experiment.PRIVATE, "private"))
    if private is not None:
        panels.append((lines_of_groups(private), "private objects", False, private.mixed))
    if lines := lines_of_data(found):
        panels.append((lines, "different pictures in the data", True, ()))
    if panels:
        _draw(panels, path)
    return bool(panels)


def draw_experts(found: Found, path: Path) -> bool:
    """Draw quality over the number of experts.

    Returns: whether there was anything to draw.
    """
    lines = lines_of_worlds(found, Experiment.EXPERTS)
    if lines:
        _draw([(lines, "number of experts", False, ())], path)
    return bool(lines)


def _draw(panels: Sequence[tuple[Lines, str, bool, Sequence[str]]], path: Path) -> None:
    """Draw panels of lines: their label, whether the axis is logarithmic, and names of places."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 4.2 * len(panels), 4.2), layout="constrained")
    listed: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    named: dict[str, Any] = {}
    for axis, (lines, label, is_log, names) in zip(listed, panels, strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda point: point[0])
            means = [each.mean for _, each in ordered]
            errors = [
                [each.mean - each.low for _, each in ordered],
                [each.high - each.mean for _, each in ordered],
            ]
            named[name] = axis.errorbar(
                [place for place, _ in ordered],
                means,
                errors,
                marker="o",
                capsize=2,
                color=f"C{_LINES.index(name)}",
                linestyle=":" if name in ("base", ORACLE) else "-",
            )
        if is_log:
            axis.set_xscale("log")
        if names:
            axis.set_xticks(range(len(names)), names)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    listed[0].set_ylabel("both objects right")
    listed[0].set_ylim(-0.02, 1.02)
    order = [name for name in _LINES if name in named]
    figure.legend([named[n] for n in order], order, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def draw_fronts(outcomes: Outcomes, path: Path) -> None:
    """Draw all rows over what they cost, and the front of the best ones at each cost.

    The front has the largest shares, with their intervals; neighbours may not be told apart.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    listed: Any = figure.subplots(1, 2, sharey=True)
    costs: tuple[tuple[Literal["total", "expert_calls"], str], ...] = (
        ("total", "pictures in all trainings"),
        ("expert_calls", "expert calls for a picture"),
    )
    for axis, (cost, label) in zip(listed, costs, strict=True):
        known = {
            row: outcomes.total(row) if cost == "total" else outcomes.calls(row)
            for row in outcomes.rows
        }
        points = {
            row: (value, outcomes.mean(row, outcomes.mixed))
            for row, value in known.items()
            if value is not None
        }
        places = [value for value, _ in points.values()]
        axis.scatter(places, [each.mean for _, each in points.values()], s=14, color="0.6")
        front = outcomes.front(cost, outcomes.mixed)
        at = [points[row][0] for row in front]
        found = [points[row][1] for row in front]
        means = [each.mean for each in found]
        ends = [
            [each.mean - each.low for each in found],
            [each.high - each.mean for each in found],
        ]
        axis.step(at, means, where="post", color="C3")
        axis.errorbar(at, means, ends, marker="o", capsize=2, linestyle="none", color="C3")
        for row in dict.fromkeys([*front, AFA, ORACLE]):
            if row in points:
                value, each = points[row]
                axis.annotate(
                    row,
                    (value, each.mean),
                    (3, 4),
                    textcoords="offset points",
                    rotation=40,
                    rotation_mode="anchor",
                    fontsize=7,
                )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)  # labels are on the right of their points
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    listed[0].set_ylabel("both objects right")
    listed[0].set_ylim(-0.02, 1.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
