"""Measure speed against quality: settings of `afa.accelerate` on emoji scenes.

    python -m benchmarks.acceleration_study runs/acceleration-study    # half an hour; resumes

Three ensembles with different training seeds draw mixed prompts of held-out pairs with every
setting. The base model and a merge draw them with the presets. The prompts have another seed than
those of the comparison but overlap with them: 9 of 96 prompts and 35 of 53 pairs are the same. So a
choice made here has seen a part of the comparison. Times are relative to one exact model; quality
differences are relative to exact AFA, paired over prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.ensemble.caching.settings import PRESETS
from afa.evaluation.prompts import load_prompts
from afa.evaluation.recipe import slug
from afa.studies.evaluating import evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, train_aggregators_job
from afa.studies.trainings import aggregators
from afa.studies.zoo_build.evaluate import NUM_STEPS as STUDIED_STEPS
from afa.studies.zoos import SHIPPED
from benchmarks import page
from benchmarks.rounds import Spread, ratio, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS_SEED = 3_000_000
NUM_SEEDS = 3
SUBJECT, ONE = "AFA", "base"
SETTINGS: dict[str, dict[str, Any]] = {
    "interval 2": {"interval": 2},
    "interval 2, weights kept": {"interval": 2, "keep_weights": True},
    "interval 3, weights kept": {"interval": 3, "keep_weights": True},
    "interval 4, weights kept": {"interval": 4, "keep_weights": True},
    "interval 4, first 2, weights kept": {"interval": 4, "first": 2, "keep_weights": True},
    "interval 5, first 2, weights kept": {"interval": 5, "first": 2, "keep_weights": True},
    "interval 10, first 2, weights kept": {"interval": 10, "first": 2, "keep_weights": True},
    "drift 0.25, weights kept": {"interval": 50, "drift": 0.25, "keep_weights": True},
    "drift 0.3, weights kept": {"interval": 50, "drift": 0.3, "keep_weights": True},
    "drift 0.5, weights kept": {"interval": 50, "drift": 0.5, "keep_weights": True},
    "interval 3, fresh 2, weights kept": {"interval": 3, "fresh": 2, "keep_weights": True},
    "interval 3, prediction": {"interval": 3, "fresh": 0},
}
#: settings that are also drawn with other numbers of steps
CURVE = ("interval 3, weights kept", "interval 4, first 2, weights kept")
NUM_STEPS = (8, 12, 20, 50)
RIVALS: dict[str, dict[str, Any]] = {
    ONE: {"model": SHIPPED.base},
    "expert: things": {"model": SHIPPED.experts["things"]},
    "add-difference merge": {"merge": {"method": "add_difference", "weights": [0.1] * 3}},
}


def main() -> None:
    """Train, draw and judge, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument(
        "--record", action="store_true", help="write the result to docs/benchmarks.md"
    )
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folders = [work / "trained" / f"afa-{seed}" for seed in range(NUM_SEEDS)]
    num_processes = os.cpu_count() or 1
    jobs = [
        Job(folder.name, train_aggregators_job, (aggregators(seed), folder))
        for seed, folder in enumerate(folders)
    ]
    for event in run_jobs(jobs, num_processes):
        if event.done % 50 == 0:
            sys.stderr.write(f"{event.name}: step {event.done} of {event.total}\n")
    compared = {
        "experts": list(SHIPPED.experts.values()),
        "base": SHIPPED.base,
        "prompts": {"zoo": {"kinds": {"mixed": arguments.num_prompts}, "seed": PROMPTS_SEED}},
        "methods": methods([str(folder) for folder in folders]),
        "sampling": sampling(STUDIED_STEPS),
        "metrics": ["scenes"],
        "subject": SUBJECT,
        "curve": {
            "num_steps": list(NUM_STEPS),
            "methods": [SUBJECT, *(f"{SUBJECT}: {name}" for name in ("balanced", "fast", *CURVE))],
            "limit": arguments.num_prompts // 3,
        },
        "num_resamples": 10_000,
    }
    evaluate_in_processes(work / "comparison", compared, num_processes)
    report = json.loads((work / "comparison" / "report.json").read_text())
    ratios = time_all(compared)
    text = table(report, ratios)
    if arguments.record:
        times = {name: spread.as_json() for name, spread in ratios.items()}
        draw_curve(report, ratios, page.DOCS / "images" / "benchmarks-speed.png")
        draw_pictures(work / "comparison", page.DOCS / "images" / "benchmarks-pictures.png")
        curve = curve_table(report)
        results = {"table": text, "curve": curve, "paired": report["paired"], "ratios": times}
        page.record("study", results)
    print(text)  # noqa: T201


def methods(ensembles: list[str]) -> list[dict[str, Any]]:
    """List the methods of the comparison."""
    fast = {name: preset.describe() for name, preset in PRESETS.items() if not preset.is_exact}
    rows: list[dict[str, Any]] = [{"name": SUBJECT, "ensemble": ensembles}]
    for name, settings in {**fast, **SETTINGS}.items():
        rows.append({"name": f"{SUBJECT}: {name}", "ensemble": ensembles, "acceleration": settings})
    for name, way in RIVALS.items():
        rows.append({"name": name, **way})
        for preset, settings in fast.items():
            rows.append({"name": f"{name}: {preset}", **way, "acceleration": settings})
    return rows


def time_all(compared: dict[str, Any], num_rounds: int = 5, batch: int = 8) -> dict[str, Spread]:
    """Measure the time of a batch, relative to one model that runs alternately; one thread."""
    import torch

    from afa.evaluation.methods import MethodBuilder
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.work import draw

    torch.set_num_threads(1)
    recipe = EvaluateRecipe.model_validate(compared)
    builder, sampling = MethodBuilder(recipe, recipe.sampling), recipe.sampling
    places = range(batch)
    prompts = [prompt.text for prompt in load_prompts(recipe.prompts)][: len(places)]

    def drawing(pipeline: Any) -> Callable[[], object]:
        return lambda: draw(pipeline, prompts, places, 0, sampling.num_steps, sampling)

    one = drawing(builder.build(next(m for m in recipe.methods if m.name == ONE)))
    found = {}
    for method in recipe.methods:
        both = {"one": one, "it": drawing(builder.build(method))}
        found[method.name] = ratio(take_turns(both, num_rounds), "it", "one")
    return found


def table(report: dict[str, Any], ratios: dict[str, Spread]) -> str:
    """Format a row per setting: the share of correct pictures and the time."""
    cells = page.quality_cells(report, SUBJECT)
    head = ["setting", "correct pictures", "minus exact AFA", "time relative to one model"]
    return page.as_table(head, [[name, *own, str(ratios[name])] for name, own in cells.items()])


def curve_table(report: dict[str, Any]) -> str:
    """Format correct pictures and time relative to exact AFA, by number of steps."""
    points = {(row["method"], row["num_steps"]): row for row in report["curve"]}
    names = dict.fromkeys(name for name, _ in points)
    rows = []
    for name in names:
        cells = [name]
        for num_steps in NUM_STEPS:
            row, exact = points[name, num_steps], points[SUBJECT, num_steps]
            share = row["measured"]["seconds_per_image"] / exact["measured"]["seconds_per_image"]
            cells.append(f"{row['scores']['both']['mean']:.3f}, {share:.2f}")
        rows.append(cells)
    return page.as_table(["setting", *(f"{n} steps" for n in NUM_STEPS)], rows)


_SHOWN = (
    SUBJECT,
    f"{SUBJECT}: balanced",
    f"{SUBJECT}: fast",
    f"{SUBJECT}: drift 0.3, weights kept",
    f"{SUBJECT}: drift 0.5, weights kept",
    f"{ONE}: fast",
)


_MARKERS = {"exact": "o", "balanced": "s", "fast": "^"}


def draw_curve(report: dict[str, Any], ratios: dict[str, Spread], path: Path) -> None:
    """Plot correct pictures against time; lines join the presets of each method."""
    from matplotlib.figure import Figure

    rows = {row["method"]: row["groups"]["mixed"]["scores"]["both"] for row in report["rows"]}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    families = {SUBJECT: "#0072B2", "add-difference merge": "#009E73", ONE: "#E69F00"}
    for family, colour in families.items():
        names = [name for name in rows if name.split(":")[0] == family]
        presets = [family, *(f"{family}: {preset}" for preset in ("balanced", "fast"))]
        for name in names:
            score, time = rows[name], ratios[name].median
            error = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
            preset = "exact" if name == family else name.removeprefix(f"{family}: ")
            axes.errorbar(time, score["mean"], yerr=error, color=colour, alpha=0.3, zorder=1)
            axes.plot(
                time,
                score["mean"],
                _MARKERS.get(preset, "."),
                color=colour,
                label=f"{family}, {preset}" if preset in _MARKERS else None,
                zorder=3,
            )
        line = [(ratios[name].median, rows[name]["mean"]) for name in presets]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1, zorder=2)
    axes.plot([], [], ".", color=families[SUBJECT], label=f"{SUBJECT}, other settings")
    axes.set_xlabel("time of a picture, by one exact model's")
    axes.set_ylabel("right object on the right side, twice")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_pictures(comparison: Path, path: Path, num_prompts: int = 8) -> None:
    """Draw the same prompts and noise at several speeds, one speed per row."""
    from matplotlib.figure import Figure
    from PIL import Image

    prompts = json.loads((comparison / "prompts.json").read_text())["prompts"][:num_prompts]
    figure = Figure(figsize=(1.3 * num_prompts + 1.5, 1.4 * len(_SHOWN)), layout="constrained")
    axes = figure.subplots(len(_SHOWN), num_prompts)
    for row, method in enumerate(_SHOWN):
        place = comparison / "methods" / slug(method) / "replica-0" / "seed-0" / "steps-20"
        for column, (text, _) in enumerate(prompts):
            axis = axes[row, column]
            axis.imshow(Image.open(place / f"{column:06d}.png"))
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel("\n".join(textwrap.wrap(method, 14)), fontsize=7)
            if row == 0:
                axis.set_title("\n".join(textwrap.wrap(text, 20)), fontsize=6)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
