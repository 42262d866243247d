"""The report of a comparison: `report.json`, `report.md`, `scores.csv` and figures."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from afa.evaluation.plots import draw_all
from afa.evaluation.shares import read_shares
from afa.evaluation.work import write_json
from afa.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from afa.evaluation.results import MeanCost, Results

_NUM_FAILURES = 8


def write_report(results: Results, output: Path) -> None:
    """Write `report.json`, `report.md`, `scores.csv` and the figures to `output`."""
    report = report_of(results)
    write_json(output / "report.json", report)
    write_atomic(output / "scores.csv", _scores_text(results))
    draw_all(report, results, output)
    write_atomic(output / "report.md", report_text(report))


def _scores_text(results: Results) -> str:
    """The scores of all pictures as CSV; `prompt_number` is the name of the picture's file."""
    text = io.StringIO()
    names = ["method", "replica", "seed", "prompt_number", "group", *results.score_names, "prompt"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results.of_pictures())
    return text.getvalue()


def report_of(results: Results) -> dict[str, Any]:
    """The report as JSON.

    Only the values under `measured` (seconds and memory) vary between runs of the same recipe.
    """
    recipe = results.recipe
    own = {each.name: each.guidance for each in recipe.methods if each.guidance is not None}
    report: dict[str, Any] = {
        "format": "afa-report",
        "version": 1,
        "subject": recipe.subject_name,
        "primary": results.primary,
        "scores": results.score_names,
        "set_scores": [metric.name for metric in results.scoring.set_metrics],
        "groups": {group: len(places) for group, places in results.groups.items()},
        "references": {group: results.references(group) for group in results.groups},
        "sampling": recipe.sampling.model_dump(mode="json", exclude={"device"}),
        **({"guidance": own} if own else {}),
        "num_resamples": recipe.num_resamples,
        "rows": [_row(results, method.name) for method in recipe.methods],
        "paired": _paired(results),
        "curve": _curve(results),
        "failures": _failures(results),
        "weights": read_shares(results.store, recipe),
        "measured": {"on": results.machines()},
    }
    return report


def _row(results: Results, name: str) -> dict[str, Any]:
    method = next(m for m in results.recipe.methods if m.name == name)
    cost = results.cost(name)
    groups: dict[str, Any] = {}
    for group in results.groups:
        scores: dict[str, Any] = {}
        for score in results.score_names:
            by_replica = results.scores(name, score, group).mean(1).tolist()
            scores[score] = {
                **asdict(results.mean(name, score, group)),
                "by_replica": by_replica,
            }
        sets = {
            metric: {"mean": sum(numbers) / len(numbers), "by_replica": numbers}
            for metric, numbers in results.set_scores(name, group).items()
        }
        groups[group] = {"scores": scores, "sets": sets}
    return {
        "method": name,
        "kind": results.kind(method),
        "num_replicas": method.num_replicas,
        "groups": groups,
        "expert_calls_per_image": cost.expert_calls,
        "measured": _measured(cost),
    }


def _measured(cost: MeanCost) -> dict[str, Any]:
    mib = None if cost.peak_memory is None else round(cost.peak_memory / 2**20)
    return {"seconds_per_image": cost.seconds, "peak_memory_mib": mib}


def _paired(results: Results) -> list[dict[str, Any]]:
    """Compare all methods with the best expert and its shell, and the subject with all methods."""
    rows = []
    for group in results.groups:
        for role, reference in results.references(group).items():
            for name in results.methods:
                if name == reference:
                    continue
                ours, theirs = (reference, name) if role == "subject" else (name, reference)
                for score in results.score_names:
                    paired = results.paired(ours, theirs, score, group)
                    rows.append(
                        {
                            "group": group,
                            "role": role,
                            "score": score,
                            "method": ours,
                            "against": theirs,
                            **asdict(paired),
                        }
                    )
    return rows


def _curve(results: Results) -> list[dict[str, Any]]:
    if results.recipe.curve is None:
        return []
    rows = []
    for name in results.curve_methods():
        for num_steps in results.recipe.curve.num_steps:
            scores, cost = results.curve_point(name, num_steps)
            rows.append(
                {
                    "method": name,
                    "num_steps": num_steps,
                    "num_prompts": len(results.curve_places()),
                    "scores": {score: asdict(interval) for score, interval in scores.items()},
                    "expert_calls_per_image": cost.expert_calls,
                    "measured": _measured(cost),
                }
            )
    return rows


def _failures(results: Results) -> list[dict[str, Any]]:
    """The prompts with the subject's lowest scores, and all methods' scores for them."""
    if results.primary is None:
        return []
    group = next(iter(results.groups))
    rows = []
    for place in results.worst(_NUM_FAILURES, group):
        column = results.groups[group].index(place)
        scores = {
            name: float(results.scores(name, results.primary, group)[:, column].mean())
            for name in results.methods
        }
        rows.append({"place": place, "prompt": results.prompts[place].text, "scores": scores})
    return rows


# -- as a text --------------------------------------------------------------------------------


def report_text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    sampling = report["sampling"]
    lines = [
        f"# {report['subject']} compared with {len(report['rows']) - 1} other methods",
        "",
        f"{sampling['num_steps']} steps, guidance {sampling['guidance']:g}, seeds "
        f"{', '.join(map(str, sampling['seeds']))}; all methods start from the same noise. "
        "Brackets are 95 % intervals: Wilson's for rates of correct pictures, otherwise a "
        "bootstrap over prompts and separately trained replicas.",
    ]
    if scheduler := sampling.get("scheduler"):
        lines[-1] += f" Scheduler of all methods: {scheduler}."
    if own := report.get("guidance"):
        listed = "; ".join(f"{name}: {scale:g}" for name, scale in own.items())
        lines[-1] += f" Methods with another guidance: {listed}."
    machines = report["measured"]["on"]
    if len(machines) > 1:
        lines += [
            "",
            "**Drawn on several machines or with several software versions**, so seconds and "
            f"memory of different rows are not comparable: {' | '.join(machines)}.",
        ]
    for group, count in report["groups"].items():
        lines += ["", f"## {group}: {count} prompts", "", *score_table(report, group)]
        lines += ["", *paired_table(report, group)]
    if report["curve"]:
        lines += ["", "## Quality against time", "", *curve_table(report), "", "![](curve.png)"]
    if report["failures"]:
        lines += ["", f"## Where {report['subject']} fails", ""]
        lines += [f"- {row['prompt']}" for row in report["failures"]]
        lines += ["", "![](failures.png)"]
    if report["weights"]:
        lines += ["", "## Fusion weights by site and step", "", "![](weights.png)"]
    lines += ["", "## Pictures", "", "![](pictures.png)", ""]
    return "\n".join(lines)


def score_table(report: dict[str, Any], group: str) -> list[str]:
    """Scores of all methods in a group, the lowest first, and the cost of a picture."""
    primary, names = report["primary"], [*report["scores"], *report["set_scores"]]
    head = ["method", *names, "expert calls", "seconds per image", "peak memory"]
    rows = report["rows"]
    if primary is not None:
        rows = sorted(rows, key=lambda row: row["groups"][group]["scores"][primary]["mean"])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        scores, sets = row["groups"][group]["scores"], row["groups"][group]["sets"]
        cells = [row["method"], *(_interval(scores[name]) for name in report["scores"])]
        cells += [f"{sets[k]['mean']:.3g}" if k in sets else "-" for k in report["set_scores"]]
        memory = row["measured"]["peak_memory_mib"]
        cells += [
            _known(row["expert_calls_per_image"], ".0f"),
            _known(row["measured"]["seconds_per_image"], ".3g"),
            _known(memory, "d", " MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _known(value: float | None, form: str, unit: str = "") -> str:
    return "unknown" if value is None else f"{value:{form}}{unit}"


def paired_table(report: dict[str, Any], group: str) -> list[str]:
    """Paired comparison of the subject with every other method by the primary score."""
    chosen = [
        row
        for row in report["paired"]
        if row["group"] == group and row["role"] == "subject" and row["score"] == report["primary"]
    ]
    if not chosen:
        return []
    roles = {name: role for role, name in report["references"][group].items()}
    lines = [
        f"| {report['subject']} against | {report['primary']} | wins | losses | ties | sign p |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(chosen, key=lambda row: -row["difference"]["mean"]):
        role = roles.get(row["against"])
        name = row["against"] if role is None else f"{row['against']} ({role})"
        difference = row["difference"]
        signed = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        lines.append(
            f"| {name} | {signed} | {row['wins']} | {row['losses']} "
            f"| {row['ties']} | {row['p_value']:.2g} |"
        )
    return lines


def curve_table(report: dict[str, Any]) -> list[str]:
    """The table of methods at several numbers of steps."""
    primary = report["primary"]
    lines = ["| method | steps | " + f"{primary} | expert calls | seconds per image |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {row['method']} | {row['num_steps']} | {_interval(row['scores'][primary])} "
        f"| {_known(row['expert_calls_per_image'], '.0f')} "
        f"| {_known(row['measured']['seconds_per_image'], '.3g')} |"
        for row in report["curve"]
        if primary is not None
    ]
    return lines


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
