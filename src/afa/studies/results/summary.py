"""All figures of the page as JSON, and what measuring them took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.studies.results.analysis import SETS
from afa.studies.results.rows import AFA, DISTILLED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.statistics import Interval
    from afa.studies.results.analysis import Outcomes
    from afa.studies.results.parts import Experiment


def summary(found: Mapping[tuple[Experiment, str], Outcomes]) -> list[dict[str, Any]]:
    """The tests, each with its rows: shares and differences with their intervals, and costs.

    Rows without outcomes are named as `not_measured`. Files of outcomes have single pictures.
    """
    return [
        {
            "experiment": str(experiment),
            "world": world,
            "divergence": outcomes.content["divergence"],
            "prompts": {group: len(outcomes.places([group])) for group in outcomes.groups},
            "num_steps": outcomes.content["sampling"]["num_steps"],
            "guidance": outcomes.content["sampling"]["guidance"],
            "real": outcomes.content["real"],
            "rows": [_row(outcomes, name) for name in outcomes.rows],
            "not_measured": not_measured(outcomes),
            "hours": hours(outcomes),
        }
        for (experiment, world), outcomes in found.items()
    ]


def not_measured(outcomes: Outcomes) -> list[str]:
    """The planned rows without outcomes."""
    return [row for row in outcomes.content["planned"] if row not in outcomes.rows]


def _row(outcomes: Outcomes, name: str) -> dict[str, Any]:
    row = outcomes.rows[name]
    against = {}
    if name != AFA and AFA in outcomes.rows:
        for group in (*outcomes.mixed, *outcomes.own):
            each = outcomes.compared([name], AFA, [group])[name]
            against[group] = {
                **_interval(each.paired.difference),
                "p_value": each.p_value,
                "verdict": each.verdict,
            }
    return {
        "row": name,
        "both": {group: _interval(outcomes.mean(name, [group])) for group in outcomes.groups},
        "clip_t": {
            group: _interval(outcomes.mean(name, [group], "clip_t")) for group in outcomes.groups
        },
        **{score: _rounded(outcomes.distance(name, score)) for score in SETS},
        "minus_afa": against,
        "seeds": row["seeds"],
        "trained_on": row["budget"],
        "expert_calls": outcomes.calls(name),
        "seconds": row["seconds"],
        "peak_memory": row["peak_memory"],
        "commit": row["commit"],
        "machine": row["machine"],
    }


def _interval(found: Interval) -> dict[str, float]:
    return {key: round(getattr(found, key), 4) for key in ("mean", "low", "high")}


def _rounded(found: Interval) -> dict[str, float]:
    return {key: float(f"{getattr(found, key):.4g}") for key in ("mean", "low", "high")}


def hours(outcomes: Outcomes) -> dict[str, float]:
    """Hours of one processor core: of the trainings of all rows, and of drawing their pictures.

    Without worlds, the search for settings, the pictures from which students learn, and metrics.
    """
    trained = sum(
        each["seconds_per_step"] * _steps(outcomes, name, each)
        for name, row in outcomes.rows.items()
        for each in row["trained"]
    )
    prompts = len(outcomes.content["prompts"])
    drawn = sum(
        row["seconds"] * prompts * len(row["outcomes"]["both"])
        for row in outcomes.rows.values()
        if row["seconds"] is not None
    )
    return {"trainings": round(trained / 3600, 2), "pictures": round(drawn / 3600, 2)}


def _steps(outcomes: Outcomes, name: str, training: Mapping[str, Any]) -> int:
    """The length of a training."""
    if name.startswith(DISTILLED):
        steps = outcomes.content["settings"]["distilled_steps"]
    else:
        steps = training["steps"] or outcomes.content["aggregator_steps"]
    return int(steps)
