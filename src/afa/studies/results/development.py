"""The learning rates and lengths of aggregators, chosen on development prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.provenance import commit, processor
from afa.studies.evaluating import StageStarted, evaluate_in_processes, sampling
from afa.studies.jobs import run_jobs
from afa.studies.results.comparison import write_prompts
from afa.studies.results.entrants import Aggregated
from afa.studies.results.rows import AFA, PREDICTIONS, PREDICTIONS_ONLY, counted
from afa.studies.worlds.prompts import prompts_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from afa.studies.jobs import JobProgress
    from afa.studies.results.entrants import Place
    from afa.studies.results.settings import StudySettings

DEVELOPED = "developed.json"
#: the rows whose aggregators are developed, with their settings; ablations take those of AFA
_ROWS: dict[str, dict[str, Any]] = {AFA: {}, PREDICTIONS: PREDICTIONS_ONLY}

Shares = dict[str, dict[str, float]]
#: how often a learning rate beyond the best one is tried
MOST_WIDENINGS = 2


def read_developed(folder: Path, settings: StudySettings) -> dict[str, Any]:
    """Read what was chosen for all worlds.

    Args:
        folder: of the settings that were chosen.
        settings: of the study.

    Returns: by row, its `steps`, `rate` and `is_edge` (whether the rate is the first or last one);
        `shares` of all candidates; and the `inputs`.

    Raises:
        AfaError: if nothing is chosen yet, or it was chosen with other settings.
    """
    path = folder / DEVELOPED
    if not path.exists():
        raise AfaError(
            "AFA-STUDY-022",
            "The settings of AFA are not chosen yet. Run the stage development of the experiment "
            "main first.",
        )
    found: dict[str, Any] = read_json(path)
    if found["inputs"] != _inputs(settings):
        raise AfaError(
            "AFA-STUDY-023",
            f"'{path}' was chosen with other settings of the study. Remove it, and run the stage "
            "development again.",
        )
    return found


def developed(folder: Path, settings: StudySettings) -> StudySettings:
    """The settings of the study with what development prompts chose; see `read_developed`."""
    found = read_developed(folder, settings)["rows"]
    return replace(
        settings,
        aggregator_steps=found[AFA]["steps"],
        aggregator_rate=found[AFA]["rate"],
        predictions_steps=found[PREDICTIONS]["steps"],
        predictions_rate=found[PREDICTIONS]["rate"],
    )


def _inputs(settings: StudySettings) -> dict[str, Any]:
    keys = ("aggregator_lengths", "aggregator_rates", "batch_size", "num_pictures")
    inputs = {key: getattr(settings, key) for key in (*keys, "num_development", "num_steps")}
    found: dict[str, Any] = json.loads(json.dumps(inputs))
    return found


def develop(
    place: Place, settings: StudySettings, num_processes: int, folder: Path
) -> Iterator[JobProgress | StageStarted]:
    """Choose the learning rate of the shortest length, then the length at that rate.

    The best candidate has the largest share of right pictures, averaged over all groups of prompts;
    of equal ones, it is the first one. While it is the smallest or the largest rate, one more is
    tried beyond it, see `widened`.

    Args:
        place: of the world.
        settings: of the study.
        num_processes: number of processes with one thread each.
        folder: of the settings that were chosen; what it has already is not chosen again.

    Yields:
        The progress.

    Raises:
        AfaError: if it was chosen with other settings, or a candidate fails.
    """
    if (folder / DEVELOPED).exists():
        read_developed(folder, settings)
        return
    lengths, rates = settings.aggregator_lengths, settings.aggregator_rates
    tried = {row: [_candidate(row, lengths[0], rate) for rate in rates] for row in _ROWS}
    shares = yield from _shares(place, settings, num_processes, tried)
    for _ in range(MOST_WIDENINGS):
        further = {row: _further(listed, shares) for row, listed in tried.items()}
        if not any(further.values()):
            break
        for row, rate in further.items():
            tried[row] += [] if rate is None else [_candidate(row, lengths[0], rate)]
        shares = yield from _shares(place, settings, num_processes, tried)
    chosen: dict[str, dict[str, Any]] = {}
    for row, listed in tried.items():
        rate = _best_rate(listed, shares)
        is_edge = _further(listed, shares) is not None
        chosen[row] = {"rate": rate, "is_edge": is_edge, "num_rates": len(listed)}
        listed += [_candidate(row, steps, rate) for steps in lengths[1:]]
    shares = yield from _shares(place, settings, num_processes, tried)
    for row, listed in tried.items():
        of_rate = [each for each in listed if each.rate == chosen[row]["rate"]]
        chosen[row]["steps"] = best_of(of_rate, shares).steps
    content = {
        "rows": chosen,
        "shares": shares,
        "inputs": _inputs(settings),
        "commit": commit(),
        "machine": processor(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / DEVELOPED, json.dumps(content, indent=1) + "\n")


def widened(rates: Sequence[float], best: float) -> float | None:
    """The next learning rate beyond the best one; None if it has been tried on both sides."""
    mantissa, exponent = f"{best:.0e}".split("e")  # rates are 1e-4, 3e-4, 1e-3, ...
    is_one, power = mantissa == "1", int(exponent)
    if best == max(rates):
        return float(f"3e{power}" if is_one else f"1e{power + 1}")
    if best == min(rates):
        return float(f"3e{power - 1}" if is_one else f"1e{power}")
    return None


def _rate(candidate: Aggregated) -> float:
    assert candidate.rate is not None, "candidates have a rate of their own"
    return candidate.rate


def _best_rate(listed: Sequence[Aggregated], shares: Mapping[str, Mapping[str, float]]) -> float:
    return _rate(best_of(listed, shares))


def _further(
    listed: Sequence[Aggregated], shares: Mapping[str, Mapping[str, float]]
) -> float | None:
    return widened([_rate(each) for each in listed], _best_rate(listed, shares))


def _candidate(row: str, steps: int, rate: float | None) -> Aggregated:
    name = f"{counted(row, steps)} at {rate:g}"
    return Aggregated(name, changes=_ROWS[row], steps=steps, rate=rate)


def best_of(listed: Sequence[Aggregated], shares: Mapping[str, Mapping[str, float]]) -> Aggregated:
    """The candidate with the largest share of right pictures over all groups."""
    return max(listed, key=lambda each: sum(shares[each.row].values()))


def _shares(
    place: Place,
    settings: StudySettings,
    num_processes: int,
    tried: Mapping[str, Sequence[Aggregated]],
) -> Generator[JobProgress | StageStarted, None, Shares]:
    """Train and draw candidates, or resume: the shares of right pictures by candidate and group."""
    listed = [each for several in tried.values() for each in several]
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
    report = read_json(place.work / "development" / "report.json")
    return {
        row["method"]: {
            group: found["scores"]["both"]["mean"] for group, found in row["groups"].items()
        }
        for row in report["rows"]
    }


def samples_of_development(settings: StudySettings, num_rates: int) -> int:
    """The pictures that the candidates of one row were trained on.

    Args:
        settings: of the study.
        num_rates: learning rates that were tried at the shortest length.
    """
    shortest, *longer = settings.aggregator_lengths
    return (shortest * num_rates + sum(longer)) * settings.batch_size
