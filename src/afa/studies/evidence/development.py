"""The length and the learning rate of AFA itself, chosen on development prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.studies.evidence.comparison import write_prompts
from afa.studies.evidence.entrants import Aggregated
from afa.studies.evidence.rows import AFA, counted
from afa.studies.results.jobs import run_jobs
from afa.studies.results.plan import sampling
from afa.studies.results.run import StageStarted, evaluate_in_processes
from afa.studies.worlds.prompts import prompts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from afa.studies.evidence.entrants import Place
    from afa.studies.evidence.settings import EvidenceSettings
    from afa.studies.results.jobs import JobProgress

DEVELOPED = "developed.json"


def developed(place: Place, settings: EvidenceSettings) -> EvidenceSettings:
    """The settings of the study with those of AFA that development prompts chose.

    Args:
        place: of the world where they are chosen, for all worlds.
        settings: of the study.

    Raises:
        AfaError: if they are not chosen yet.
    """
    path = place.work / DEVELOPED
    if not path.exists():
        raise AfaError(
            "AFA-STUDY-022",
            "The settings of AFA are not chosen yet. Run the stage development of the experiment "
            "main first.",
        )
    best = read_json(path)["best"]
    return replace(settings, aggregator_steps=best["steps"], aggregator_rate=best["rate"])


def candidates(settings: EvidenceSettings) -> list[Aggregated]:
    """One training at each length and learning rate."""
    return [
        Aggregated(f"{counted(AFA, steps)} at {rate:g}", steps=steps, rate=rate)
        for steps, rate in settings.developed
    ]


def develop(
    place: Place, settings: EvidenceSettings, num_processes: int
) -> Iterator[JobProgress | StageStarted]:
    """Train all candidates, draw development prompts, and choose the best one.

    The best one has the largest share of right pictures, averaged over all groups of prompts. All
    shares are kept.
    """
    listed = candidates(settings)
    yield from run_jobs([each.job(place, settings) for each in listed], num_processes)
    prompts = prompts_of(place.recipe, "development", settings.num_development)
    recipe = {
        "prompts": {"drawbench": str(write_prompts(place.work / "development.csv", prompts))},
        "methods": [{"name": each.row, **each.method(place)} for each in listed],
        "sampling": sampling(settings.num_steps),
        "metrics": ["scenes"],
        "num_resamples": 1_000,
    }
    yield StageStarted(f"development prompts of the world '{place.world}'")
    evaluate_in_processes(place.work / "development", recipe, num_processes)
    chosen = choose(read_json(place.work / "development" / "report.json"), listed)
    write_atomic(place.work / DEVELOPED, json.dumps(chosen, indent=2) + "\n")


def choose(report: Mapping[str, Any], listed: list[Aggregated]) -> dict[str, Any]:
    """The best candidate, the first one of equal ones, and the shares of all by group."""
    shares = {
        row["method"]: {
            group: found["scores"]["both"]["mean"] for group, found in row["groups"].items()
        }
        for row in report["rows"]
    }
    best = max(listed, key=lambda each: sum(shares[each.row].values()))
    return {"best": {"row": best.row, "steps": best.steps, "rate": best.rate}, "shares": shares}
