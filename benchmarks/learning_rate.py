"""Learning rate and length of the training, on the emoji scenes: loss against judged pictures.

    python benchmarks/learning_rate.py runs/learning-rate    # goes on where it was stopped

Every training is judged by the validation loss and by the share of mixed prompts whose picture has
the right object on either side, on the same prompts and noise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from afa.study.jobs import Job, run_jobs, train_aggregators_job
from afa.study.plan import StudySettings, aggregator_recipes, sampling
from afa.study.run import evaluate_in_processes
from afa.training.recipe import Recipe, ValidationRecipe

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
LENGTHS = (125, 500, 1500)


def main() -> None:
    """Train all, judge all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--num-prompts", type=int, default=96)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    recipes = {
        f"{rate:g} x {steps}": recipe(rate, steps) for rate in LEARNING_RATES for steps in LENGTHS
    }
    folders = {name: work / "trained" / name.replace(" ", "") for name in recipes}
    num_processes = os.cpu_count() or 1
    jobs = [
        Job(name, train_aggregators_job, (asked, folders[name])) for name, asked in recipes.items()
    ]
    jobs.sort(key=lambda job: -recipes[job.name].training.num_steps)
    for event in run_jobs(jobs, num_processes):
        if event.done % 50 == 0:
            sys.stderr.write(f"{event.name}: step {event.done} of {event.total}\n")
    compared = {
        "prompts": {"zoo": {"kinds": {"mixed": arguments.num_prompts}}},
        "methods": [{"name": name, "ensemble": str(folder)} for name, folder in folders.items()],
        "sampling": sampling(StudySettings().num_steps),
        "metrics": ["scenes"],
    }
    evaluate_in_processes(work / "comparison", compared, num_processes)
    report = json.loads((work / "comparison" / "report.json").read_text())
    print(table(recipes, folders, report))  # noqa: T201


def recipe(learning_rate: float, num_steps: int) -> Recipe:
    """A training of the study's with another learning rate and length, and with validation."""
    settings = StudySettings(num_train_steps=num_steps, learning_rate=learning_rate, num_seeds=1)
    every = max(25, num_steps // 10)
    whole = aggregator_recipes(settings)["afa-0"]
    return whole.model_copy(update={"validation": ValidationRecipe(num_samples=128, every=every)})


def table(recipes: dict[str, Recipe], folders: dict[str, Path], report: dict[str, Any]) -> str:
    """A row for each training: loss at a tenth of its length, at the end, and the pictures."""
    rows = {row["method"]: row["groups"]["mixed"]["scores"]["both"] for row in report["rows"]}
    lines = [
        "| learning rate | steps | validation loss at a tenth | at the end | right pictures |",
        "|---|---|---|---|---|",
    ]
    for name, asked in recipes.items():
        losses = validation_losses(folders[name])
        score = rows[name]
        lines.append(
            f"| {asked.training.learning_rate:g} | {asked.training.num_steps} | {losses[0]:.4f} "
            f"| {losses[-1]:.4f} | {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}] |"
        )
    return "\n".join(lines)


def validation_losses(folder: Path) -> list[float]:
    """All of a run's, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


if __name__ == "__main__":
    main()
