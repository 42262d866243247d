"""The figures of a report: scores, quality against time, pictures, failures, fusion weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.drawing.plots import comparison, heat_map, plain, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from afa.evaluation.results import Results

# the palette of Okabe and Ito, which is safe for colour blindness
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX*"  # one more than colours, so that pairs do not repeat
_NUM_PICTURES = 8


def draw_all(report: dict[str, Any], results: Results, output: Path) -> None:
    """Draw all figures of the report into its folder."""
    prompts = next(iter(results.groups.values()))[:_NUM_PICTURES]
    draw_sheet(results, _by_score(report), prompts, output / "pictures.png")
    if report["primary"] is not None:
        draw_scores(report, output / "scores.png")
        references = results.references(next(iter(results.groups)))
        names = dict.fromkeys(references.values())
        best_merge = results.best("merge", next(iter(results.groups)))
        if best_merge is not None:
            names[best_merge.name] = None
        worst = [row["place"] for row in report["failures"]]
        if worst:
            draw_sheet(results, list(names), worst, output / "failures.png")
    if report["curve"] and report["primary"] is not None:
        draw_curve(report, output / "curve.png")
    if report["weights"]:
        draw_shares(report["weights"], output / "weights.png")


def _by_score(report: dict[str, Any]) -> list[str]:
    """The methods in the order of the tables, the best last."""
    rows, primary = report["rows"], report["primary"]
    if primary is None:
        return [row["method"] for row in rows]
    group = next(iter(report["groups"]))
    rows = sorted(rows, key=lambda row: row["groups"][group]["scores"][primary]["mean"])
    return [row["method"] for row in rows]


def draw_sheet(results: Results, methods: Sequence[str], places: Sequence[int], path: Path) -> None:
    """Draw a sheet of prompts (columns) by methods (rows), with real pictures on top if available.

    Args:
        results: the results; shows the first replica and seed of each method.
        methods: methods from top to bottom.
        places: indices of the prompts from left to right.
        path: PNG or SVG file.
    """
    from afa.evaluation.work import open_pictures

    rows: dict[str, list[Image.Image]] = {}
    references = [results.prompts[place].reference for place in places]
    if all(reference is not None for reference in references):
        found = [reference for reference in references if reference is not None]
        rows["true"] = list(open_pictures(found))
    rows |= {name: list(open_pictures(results.pictures(name, places))) for name in methods}
    prompts = [results.prompts[place].text for place in places]
    comparison(rows, prompts, path, bold=[results.recipe.subject_name], dpi=95)


def draw_scores(report: dict[str, Any], path: Path) -> None:
    """Draw the primary score of each method with its interval, one panel per group."""
    from matplotlib.figure import Figure

    primary, names = report["primary"], _by_score(report)
    groups = list(report["groups"])
    rows = {row["method"]: row for row in report["rows"]}
    figure = Figure(
        figsize=(2.2 + 2.6 * len(groups), 0.9 + 0.26 * len(names)), layout="constrained"
    )
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        for height, name in enumerate(names):
            score = rows[name]["groups"][group]["scores"][primary]
            colour = _COLOURS[5] if name == report["subject"] else _COLOURS[0]
            panel.plot([score["low"], score["high"]], [height, height], color=colour, linewidth=2)
            panel.plot(score["mean"], height, "o", color=colour)
        panel.set_title(plain(f"{group} ({report['groups'][group]} prompts)"), fontsize=9)
        panel.set_xlabel(primary)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    for label, name in zip(panels[0].get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == report["subject"] else "normal")
    save_figure(figure, path)


def draw_curve(report: dict[str, Any], path: Path) -> None:
    """Draw the primary score against seconds per picture, one line per method."""
    from matplotlib.figure import Figure

    primary = report["primary"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(row["method"] for row in report["curve"]))
    for n, name in enumerate(names):
        points = [row for row in report["curve"] if row["method"] == name]
        seconds = [row["measured"]["seconds_per_image"] for row in points]
        scores = [row["scores"][primary] for row in points]
        means = [score["mean"] for score in scores]
        errors = [
            [score["mean"] - score["low"] for score in scores],
            [score["high"] - score["mean"] for score in scores],
        ]
        colour, marker = _COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)]
        dashed = "--" if n >= len(_COLOURS) else "-"
        axis.errorbar(
            seconds,
            means,
            errors,
            color=colour,
            marker=marker,
            linestyle=dashed,
            capsize=2,
            label=plain(name),
        )
        for x, y, row in zip(seconds, means, points, strict=True):
            axis.annotate(
                str(row["num_steps"]),
                (x, y),
                textcoords="offset points",
                xytext=(3, 5),
                fontsize=7,
                color=colour,
            )
    axis.set_xscale("log")
    axis.set_xlabel("seconds per picture (numbers are steps)")
    axis.set_ylabel(primary)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_shares(weights: dict[str, Any], path: Path) -> None:
    """Draw each expert's mean weight by site and step; rows are groups, columns are experts."""
    experts, sites = weights["experts"], weights["sites"]
    blank = [float("nan")] * len(experts)  # of a site without weights
    rows = {
        f"on {group} prompts": torch.tensor(
            [[step.get(site, blank) for site in sites] for step in recorded["shares"]]
        )
        for group, recorded in weights["groups"].items()
    }
    heat_map(rows, path, experts=experts, sites=sites)
