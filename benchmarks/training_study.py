"""Measure which training settings improve the pictures, on emoji scenes.

    python -m benchmarks.training_study runs/training-study    # an hour; resumes

The study varies learning rate and length, and then single settings. Every training is judged by the
validation loss, by the distribution of the weights over the experts, and by the share of mixed
prompts whose picture has the right object on each side. Prompts and noise are the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from afa.studies.evaluating import evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, train_aggregators_job
from afa.studies.trainings import aggregators
from afa.studies.zoo_build.evaluate import NUM_STEPS
from afa.training.recipe import Recipe, ValidationRecipe

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
LENGTHS = (100, 300, 1000)
#: single settings that change the run of 300 steps at learning rate 0.001
SWITCHES: dict[str, dict[str, Any]] = {
    "min_snr_gamma: 5": {"min_snr_gamma": 5.0},
    "ema_decay: 0.98": {"ema_decay": 0.98},
    "entropy_weight: 0.01": {"entropy_weight": 0.01},
    "entropy_weight: 0.1": {"entropy_weight": 0.1},
    "balance_weight: 0.01": {"balance_weight": 0.01},
    "balance_weight: 0.1": {"balance_weight": 0.1},
}


def main() -> None:
    """Train and judge all runs, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--num-prompts", type=int, default=96)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    recipes = {
        f"{rate:g}, {steps} steps": recipe(rate, steps)
        for steps in LENGTHS
        for rate in LEARNING_RATES
    }
    recipes |= {name: recipe(1e-3, 300, **changes) for name, changes in SWITCHES.items()}
    folders = {
        name: work / "trained" / name.replace(" ", "").replace(":", "=").replace(",", "-")
        for name in recipes
    }
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
        "sampling": sampling(NUM_STEPS),
        "metrics": ["scenes"],
    }
    evaluate_in_processes(work / "comparison", compared, num_processes)
    report = json.loads((work / "comparison" / "report.json").read_text())
    print(table(folders, report))  # noqa: T201


def recipe(learning_rate: float, num_steps: int, **changes: Any) -> Recipe:
    """Return the comparison's training recipe with changed settings and with validation."""
    whole = aggregators(0, num_steps, learning_rate=learning_rate, **changes)
    return whole.model_copy(
        update={
            "validation": ValidationRecipe(num_samples=128, every=num_steps // 5),
        }
    )


def table(folders: dict[str, Path], report: dict[str, Any]) -> str:
    """Format a row per training: validation losses, weights and pictures."""
    rows = {row["method"]: row["groups"]["mixed"]["scores"]["both"] for row in report["rows"]}
    lines = [
        "| training | validation loss after a fifth | at the end | entropy of a pixel's weights "
        "| smallest average weight of an expert, mean over sites | correct pictures |",
        "|---|---|---|---|---|---|",
    ]
    for name, folder in folders.items():
        seen = validations(folder)
        entropy, smallest = spread(seen[-1])
        score = rows[name]
        lines.append(
            f"| {name} | {seen[0]['validation_loss']:.4f} | {seen[-1]['validation_loss']:.4f} "
            f"| {entropy:.2f} | {smallest:.2f} "
            f"| {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}] |"
        )
    return "\n".join(lines)


def validations(folder: Path) -> list[dict[str, Any]]:
    """Read the validation records of a run, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def spread(validation: dict[str, Any]) -> tuple[float, float]:
    """Return the mean entropy and the mean smallest weight of an expert over the sites."""
    entropies: list[float] = []
    shares: dict[str, list[float]] = {}
    for key, value in validation.items():
        if key.startswith("validation/entropy/"):
            entropies.append(value)
        elif key.startswith("validation/weight/"):
            _, _, site, _ = key.split("/")
            shares.setdefault(site, []).append(value)
    return statistics.mean(entropies), statistics.mean(min(listed) for listed in shares.values())


if __name__ == "__main__":
    main()
