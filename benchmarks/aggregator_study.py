"""Measure the size of the aggregators against quality, on emoji scenes.

    python -m benchmarks.aggregator_study runs/aggregator-study    # 40 minutes; resumes

Every shape is trained with several seeds, like the comparison's ensemble. The scores are the share
of mixed prompts whose picture has the right object on each side, and the seconds per picture. The
pairs of objects are held out from training. The prompts have another seed than those of the
comparison but overlap with them: 9 of 96 prompts and 35 of 53 pairs are the same. So a choice made
here has seen a part of the comparison. Differences to the first shape are paired over prompts and
seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from afa.evaluation.recipe import slug
from afa.studies.evaluating import evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, train_aggregators_job
from afa.studies.trainings import aggregators
from afa.studies.zoo_build.evaluate import NUM_STEPS
from afa.training.recipe import Recipe
from benchmarks import page

FULL = "the paper's, hidden_ratio None, min_scale 1"
#: changes to the comparison's aggregators, by shape
SHAPES: dict[str, dict[str, Any]] = {
    FULL: {"hidden_ratio": None, "min_scale": 1},
    "hidden_ratio 1, min_scale 2": {"hidden_ratio": 1.0, "min_scale": 2},
    "hidden_ratio 0.5, min_scale 2": {"hidden_ratio": 0.5, "min_scale": 2},
}
PROMPTS_SEED = 3_000_000


def main() -> None:
    """Train and judge all shapes, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-train-steps", type=int, default=500)
    parser.add_argument(
        "--record", action="store_true", help="write the result to docs/benchmarks.md"
    )
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folders = {
        shape: [work / "trained" / f"{slug(shape)}-{seed}" for seed in range(arguments.num_seeds)]
        for shape in SHAPES
    }
    num_processes = os.cpu_count() or 1
    jobs = [
        Job(
            f"{shape}, seed {seed}",
            train_aggregators_job,
            (recipe(arguments.num_train_steps, shape, seed), folder),
        )
        for shape, listed in folders.items()
        for seed, folder in enumerate(listed)
    ]
    for event in run_jobs(jobs, num_processes):
        if event.done % 50 == 0:
            sys.stderr.write(f"{event.name}: step {event.done} of {event.total}\n")
    compared = {
        "prompts": {
            "zoo": {"kinds": {"mixed": arguments.num_prompts}, "seed": PROMPTS_SEED},
        },
        "methods": [
            {"name": shape, "ensemble": [str(folder) for folder in listed]}
            for shape, listed in folders.items()
        ],
        "sampling": sampling(NUM_STEPS),
        "metrics": ["scenes"],
        "subject": FULL,
        "num_resamples": 10_000,
    }
    evaluate_in_processes(work / "comparison", compared, num_processes)
    report = json.loads((work / "comparison" / "report.json").read_text())
    if arguments.record:
        page.record("aggregators", {"table": table(report), "paired": report["paired"]})
    print(table(report))  # noqa: T201


def recipe(num_steps: int, shape: str, seed: int) -> Recipe:
    """Return the comparison's training recipe with another shape of aggregators."""
    whole = aggregators(seed, num_steps)
    changed = replace(whole.aggregator, **SHAPES[shape])
    return whole.model_copy(update={"aggregator": changed})


def table(report: dict[str, Any]) -> str:
    """Format a row per shape."""
    cells = page.quality_cells(report, FULL)
    seconds = {row["method"]: row["measured"]["seconds_per_image"] for row in report["rows"]}
    head = ["aggregators", "correct pictures", "minus the first", "seconds per picture"]
    return page.as_table(
        head, [[name, *own, f"{seconds[name]:.2f}"] for name, own in cells.items()]
    )


if __name__ == "__main__":
    main()
