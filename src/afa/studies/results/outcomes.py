"""The outcomes of a test: compact, of every picture, so that every interval can be redone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from afa.errors import AfaError
from afa.evaluation.recipe import SCENE_SCORES, EvaluateRecipe
from afa.evaluation.results import read_results
from afa.files import read_json, write_atomic
from afa.loading.ensemble_folder import AGGREGATORS
from afa.machine.hashes import hash_file
from afa.provenance import commit
from afa.studies.jobs import finished, worker_pool
from afa.studies.results.budgets import budget, seeds_of
from afa.studies.results.kept import path_of
from afa.studies.results.parts import Experiment
from afa.studies.results.rows import AFA, DISTILLED, MERGED, WIDE_ROW, of_ensemble
from afa.studies.worlds.pack import DENOISER, TEXT_ENCODER
from afa.studies.worlds.prompts import groups_of
from afa.studies.worlds.recipe import BASE, TEXT, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from afa.evaluation.results import Results
    from afa.studies.results.entrants import Entrant, Place
    from afa.studies.results.study import Study

    #: features of pictures [pictures, width]
    Features = NDArray[np.float32]

_RESAMPLES = 200
_DIGITS = 4


def describe(
    study: Study,
    experiment: Experiment,
    place: Place,
    prompts: Mapping[str, Sequence[str]],
    sampled: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides what a test compares.

    Args:
        study: of the test.
        experiment: of the test.
        place: of the world.
        prompts: by group.
        sampled: sampling settings.
        chosen: all settings that were chosen, of rivals, tuned models and aggregators, with the
            ends of grids on which they lie.
    """
    settings = study.settings
    of_others = {
        "curve_pictures": experiment != Experiment.DATA,
        "num_mixed_elsewhere": experiment == Experiment.MAIN,
    }
    found = {
        "experiment": str(experiment),
        "world": place.world,
        "divergence": divergence(place),
        "description": place.recipe.model_dump(mode="json", exclude={"start"}),
        "prompts": [[text, group] for group, listed in prompts.items() for text in listed],
        "mixed": [group for group in groups_of(place.recipe) if group not in place.recipe.experts],
        "sampling": {key: sampled[key] for key in ("num_steps", "guidance", "seeds", "batch_size")},
        "models": hashes(place),
        "settings": {
            key: value
            for key, value in asdict(settings).items()
            if key != "num_resamples" and not of_others.get(key)
        },
        "num_references": settings.num_references,
        "margin": settings.margin,
        "aggregator_steps": settings.aggregator_steps,
        "chosen": dict(chosen),
    }
    described: dict[str, Any] = json.loads(json.dumps(found))
    return described


def wanted_rows(study: Study, test: Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """The rows that are to be drawn: those that `study.rows` asks for and have no outcomes yet.

    Args:
        study: of the test.
        test: see `describe`.
        names: of all rows.

    Raises:
        AfaError: if the outcomes are of another test, or a row is unknown.
    """
    require_rows(study, names)
    return {*(study.rows or names)} - {*_kept(study, test)["rows"]}


def hashes(place: Place) -> dict[str, str]:
    """SHA-256 of the denoisers of base and experts, and of the text encoder that they share."""
    found = {
        name: hash_file(place.models / name / DENOISER) for name in (BASE, *place.recipe.experts)
    }
    return {**found, TEXT: hash_file(place.models / BASE / TEXT_ENCODER)}


def require_rows(study: Study, names: Sequence[str]) -> None:
    """Check that the rows of `study.rows` are among those of an experiment.

    Raises:
        AfaError: if one is not.
    """
    unknown = next((row for row in study.rows if row not in names), None)
    if unknown is not None:
        raise AfaError(
            "AFA-STUDY-031",
            f"The experiment has no row '{unknown}'. Use: {'; '.join(names)}.",
        )


def require_same_ensembles(
    study: Study,
    test: Mapping[str, Any],
    place: Place,
    entrants: Sequence[Entrant],
    wanted: Collection[str],
) -> None:
    """Check that rows that draw with AFA's ensembles, or learn from them, have the same ones.

    Args:
        study: of the test.
        test: see `describe`.
        place: of the world.
        entrants: all trainings of the experiment.
        wanted: the rows that are to be drawn.

    Raises:
        AfaError: if such a row has outcomes, and its ensembles were others than those here.
    """
    asked = next((row for row in wanted if _uses_ensembles(row)), None)
    if asked is None:
        return
    ours = _ensembles(place, entrants)
    for row, content in _kept(study, test)["rows"].items():
        if content.get("ensembles", ours) != ours:
            raise AfaError(
                "AFA-STUDY-034",
                f"The row '{asked}' would use other ensembles than the row '{row}', which was "
                "tested with trainings of another machine. Remove the rows that use ensembles from "
                f"'{path_of(study.outcomes, test['experiment'], test['world'])}', and test them "
                "together.",
            )


def _uses_ensembles(row: str) -> bool:
    return row == AFA or of_ensemble(row) or row.startswith(DISTILLED)


def size_of(name: str, place: Place) -> float:
    """The parameters of a row's denoiser, relative to those of one expert."""
    if name != WIDE_ROW:
        return 1.0
    counts = [
        sum(tensor.numel() for tensor in load_file(folder / DENOISER).values())
        for folder in (place.models / WIDE, Path(place.base))
    ]
    return round(counts[0] / counts[1], 2)


def _training(entrant: Entrant, place: Place) -> dict[str, Any]:
    """The settings of a training, its commit and its seconds per step."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(entrant)))
    return {**found, **(finished(entrant.folder(place)) or {})}


def _ensembles(place: Place, entrants: Sequence[Entrant]) -> list[str]:
    """SHA-256 of AFA's aggregators, by seed."""
    folders = [each.folder(place) for each in entrants if each.row == AFA]
    return [hash_file(folder / AGGREGATORS) for folder in folders]


def _kept(study: Study, test: Mapping[str, Any]) -> dict[str, Any]:
    """The outcomes of a test that are written already.

    Raises:
        AfaError: if they are of another test.
    """
    path = path_of(study.outcomes, test["experiment"], test["world"])
    if not path.exists():
        return {"rows": {}}
    found: dict[str, Any] = read_json(path)
    ours, theirs = of_tested(test, found["rows"]), of_tested(found, found["rows"])
    wrong = [key for key, value in ours.items() if theirs.get(key) != value]
    if wrong:
        raise AfaError(
            "AFA-STUDY-030",
            f"'{path}' has outcomes of another test: {', '.join(wrong)} differ. Remove it to test "
            "all rows again.",
        )
    return found


def of_tested(test: Mapping[str, Any], rows: Collection[str]) -> dict[str, Any]:
    """A test without the settings of rows that have no outcomes, which may still change.

    Those of merges are kept once a model was tuned from the best one.

    Args:
        test: see `describe`.
        rows: the rows with outcomes.
    """

    def is_tested(row: str) -> bool:
        return any(each == row or each.startswith(f"{row} (") for each in rows)

    def kept(rivals: Mapping[str, Any]) -> dict[str, Any]:
        return {
            row: each
            for row, each in rivals.items()
            if is_tested(row) or ("merge" in each.get("method", {}) and is_tested(MERGED))
        }

    chosen = test["chosen"]
    found = {kind: kept(chosen[kind]) for kind in ("rivals", "drawn")}
    found["rates"] = {row: rate for row, rate in chosen["rates"].items() if is_tested(row)}
    return {**test, "chosen": {**chosen, **found}}


def write_outcomes(
    study: Study,
    place: Place,
    test: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: Path,
    entrants: Sequence[Entrant],
    planned: Sequence[str],
) -> None:
    """Write the outcomes of rows of a test, beside those that it has already.

    Args:
        study: of the test; the file is `EXPERIMENT-WORLD.json` in its folder of outcomes.
        place: of the world.
        test: see `describe`.
        recipe: of the comparison.
        output: folder of the comparison.
        entrants: all trainings of the experiment.
        planned: all rows of the experiment.
    """
    results = read_results(EvaluateRecipe.model_validate(recipe), output)
    mixed = test["mixed"][0]
    samples = {each.row: each.samples(study.settings) for each in entrants}
    origin = {"commit": commit(), "machine": results.machines()}
    with worker_pool(study.num_processes) as pool:
        measured = {name: row_of_test(results, name, mixed, pool.map) for name in results.methods}
    rows = {
        name: measured[name]
        | {"budget": budget(name, results, place, study.settings, samples, test["chosen"])}
        | {"seeds": seeds_of(name, entrants), "size": size_of(name, place)}
        | origin
        | ({"ensembles": _ensembles(place, entrants)} if _uses_ensembles(name) else {})
        | {"trained": [_training(each, place) for each in entrants if each.row == name]}
        for name in results.methods
    }
    kept = _kept(study, test)
    real = kept.get("real") or real_distances(results, mixed)
    head = {**test, "planned": list(planned), "real": real}
    study.outcomes.mkdir(parents=True, exist_ok=True)
    path = path_of(study.outcomes, test["experiment"], test["world"])
    write_atomic(path, _text(head, {**kept["rows"], **rows}))


def _text(head: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The content of a file of outcomes: a line for each part and for each row."""

    def lines(parts: Mapping[str, Any]) -> str:
        return ",\n".join(
            f"{json.dumps(key)}:{json.dumps(part, separators=(',', ':'), ensure_ascii=False)}"
            for key, part in parts.items()
        )

    return f'{{\n{lines(head)},\n"rows":{{\n{lines(rows)}\n}}\n}}\n'


def divergence(place: Place) -> dict[str, float]:
    """The norm of each expert's difference from the base, relative to the norm of the base."""
    base = load_file(Path(place.base) / DENOISER)
    norm = sum(float(tensor.square().sum()) for tensor in base.values())
    found = {}
    for name, source in place.experts.items():
        expert = load_file(Path(source) / DENOISER)
        moved = sum(float((expert[key] - base[key]).square().sum()) for key in base)
        found[name] = round((moved / norm) ** 0.5, _DIGITS)
    return found


def row_of_test(
    results: Results, name: str, group: str, spread: Callable[..., Any] = map
) -> dict[str, Any]:
    """The scores of every picture of a row, its distances from real scenes, and its cost.

    `spread` maps a function over the distances, which take seconds each.
    """
    every = list(range(len(results.prompts)))
    cost = results.cost(name)
    return {
        "outcomes": {
            score: [_bits(values) for values in results.scores_at(name, score, every)]
            for score in SCENE_SCORES
        },
        "clip_t": np.round(results.scores_at(name, "clip_t", every), _DIGITS).tolist(),
        "sets": set_distances(results, name, group, spread),
        "expert_calls": cost.expert_calls,
        "seconds": cost.seconds,
        "peak_memory": cost.peak_memory,
    }


def _bits(values: Sequence[float]) -> str:
    return "".join(str(round(value)) for value in values)


def set_distances(
    results: Results, name: str, group: str, spread: Callable[..., Any] = map
) -> dict[str, Any]:
    """FID, KID and CMMD of a row from independent real scenes, with intervals over pictures."""
    sets = [
        # as arrays, because tensors would be sent to other processes through shared memory
        (metric, drawn.numpy(), real.numpy())
        for metric in results.scoring.set_metrics
        for drawn, real in results.features_of(name, metric, group)
        if real is not None
    ]
    metrics, drawn, real = zip(*sets, strict=True)
    found = spread(_distance, [metric.measure for metric in metrics], drawn, real)
    distances: dict[str, Any] = {}
    for metric, each in zip(metrics, found, strict=True):
        distances.setdefault(metric.name, []).append(each)
    return distances


def _distance(
    measure: Callable[..., float], drawn_features: Features, real_features: Features
) -> dict[str, float]:
    """A distance and its 95 % interval by the bootstrap of pictures, centred on the value.

    Resamples have repeated pictures and so larger distances; only their spread is used.
    """
    drawn, real = torch.from_numpy(drawn_features), torch.from_numpy(real_features)
    generator = torch.Generator().manual_seed(0)
    value = measure(drawn, real)
    found = []
    for _ in range(_RESAMPLES):
        chosen = torch.randint(len(drawn), (len(drawn),), generator=generator)
        found.append(measure(drawn[chosen], real))
    low, high = np.quantile(found, (0.025, 0.975)) - np.mean(found)
    return {"value": value, "low": float(value + low), "high": float(value + high)}


def real_distances(results: Results, group: str) -> dict[str, float]:
    """The same distances of as many real scenes as there are prompts, from the other real ones."""
    count = len(results.groups[group])
    found = {}
    for metric in results.scoring.set_metrics:
        real = results.scoring.reference_features(metric.extractor.name)
        found[metric.name] = metric.compute(real[:count], real[count:])
    return found
