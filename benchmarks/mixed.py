"""Experts that predict different quantities, or have different architectures, on emoji scenes.

    python -m benchmarks.mixed runs/mixed --transformers runs/dit/zoo    # resumes

The bundled experts predict velocity with zero terminal SNR. Two more are fine-tuned from the base
to predict noise on an ordinary schedule; a third, of the PixArt family and with the same
autoencoder, is from the zoo of transformers. Each mixture is trained with features fused after
every block, if the architectures allow it, and with predictions alone, on the same pictures as the
ensemble of equal experts. Merges exist for experts of one kind only, and are the references.

Prompts have pairs of objects that no training showed; their seed is used nowhere else. The outcomes
of every picture go to `docs/mixed.json`, from which `benchmarks.mixed_outcomes` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from afa.aggregators import SABWSettings
from afa.evaluation.recipe import slug
from afa.files import write_atomic
from afa.loading.expert_source import ExpertSource
from afa.loading.sources import locate
from afa.merging import MergeRecipe
from afa.merging.run import merge_checkpoints
from afa.studies.evaluating import evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, train_aggregators_job
from afa.studies.trainings import scenes, training, tuned_job
from afa.studies.zoos import SHIPPED
from afa.training.recipe import DataRecipe, Recipe, ScenesRecipe
from afa.zoo import EXPERTS
from afa.zoo.models import AGGREGATOR
from benchmarks.mixed_outcomes import (
    BY_VELOCITY,
    DOCS,
    EQUAL,
    FAMILIES,
    FILE,
    MIXED,
    PREDICTIONS,
    write_page,
)
from benchmarks.outcomes import outcomes_of, write_content

#: aggregators of adequate size at the last site only
AT_END: dict[str, Any] = {"sites": "conv_out", "hidden_ratio": None, "min_scale": 1}
NOISE = ("animals", "things")
PROMPTS: dict[str, int] = {"mixed": 192, **dict.fromkeys(EXPERTS, 64)}
SEED = 7_000_000
#: of the fine-tuning to another prediction; as many steps as the zoo's experts, and half again
STEPS, RATE = 3_000, 3e-4
#: denoising steps of a picture
NUM_STEPS = 10


def main() -> int:
    """Train, draw and judge, or resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--transformers", type=Path, help="zoo of transformers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--docs", type=Path, default=DOCS)
    asked = parser.parse_args()
    work: Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    run([noise_job(work, name) for name in NOISE], asked.processes)
    mixtures = mixtures_of(work, asked.transformers)
    recipes = {
        (row, seed): recipe_of(experts, changes, seed)
        for row, (experts, changes) in mixtures.items()
        for seed in range(asked.seeds)
    }
    folders = {key: work / "trained" / f"{slug(key[0])}-{key[1]}" for key in recipes}
    jobs = [
        Job(folders[key].name, train_aggregators_job, (recipe, folders[key]))
        for key, recipe in recipes.items()
    ]
    run(jobs, asked.processes)
    methods: list[dict[str, Any]] = [
        {"name": row, "ensemble": [str(folders[row, seed]) for seed in range(asked.seeds)]}
        for row in mixtures
    ]
    methods += references(work, asked.transformers)
    recipe = {
        "experts": list(SHIPPED.experts.values()),
        "base": SHIPPED.base,
        "prompts": {"zoo": {"kinds": PROMPTS, "seed": SEED}},
        "methods": methods,
        "sampling": sampling(NUM_STEPS),
        "metrics": ["scenes"],
        "num_resamples": 10_000,
    }
    evaluate_in_processes(work / "comparison", recipe, asked.processes)
    path = asked.docs / FILE
    found = outcomes_of(recipe, work / "comparison")
    write_content(path, {"num_steps": NUM_STEPS, **found})
    write_page(asked.docs)
    return 0


def noise_job(work: Path, name: str) -> Job:
    """The job that fine-tunes the base to predict noise on one domain."""
    start = work / "start"
    if not start.exists():
        copied = work / "start.part"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(locate(SHIPPED.base), copied)
        file = copied / "scheduler" / "scheduler_config.json"
        changes = {
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "timestep_spacing": "leading",
        }
        write_atomic(file, json.dumps({**json.loads(file.read_text()), **changes}, indent=1))
        copied.rename(start)
    settings = training(0, STEPS, learning_rate=RATE)
    data = ScenesRecipe(num_samples=100_000, seed=17, kind=name)  # type: ignore[arg-type]
    return Job(f"{name}, noise", tuned_job, (str(start), data, settings, noise_of(work, name)))


def noise_of(work: Path, name: str) -> Path:
    """The folder of an expert that predicts noise."""
    return work / "experts" / f"{name}-noise"


def mixtures_of(
    work: Path, transformers: Path | None
) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The experts of each ensemble, and what differs in its recipe."""
    velocity = [SHIPPED.experts[name] for name in EXPERTS]
    noise = {name: str(noise_of(work, name)) for name in NOISE}
    noise_first = [noise["animals"], SHIPPED.experts["food"], noise["things"]]
    velocity_first = [SHIPPED.experts["food"], noise["animals"], noise["things"]]
    of_predictions = {"aggregator": AT_END}
    found: dict[str, tuple[list[str], dict[str, Any]]] = {
        EQUAL: (velocity, {}),
        f"{EQUAL}{PREDICTIONS}": (velocity, of_predictions),
    }
    by_velocity = {"training": {"velocity_loss": True}}
    for name, experts in zip(MIXED, (noise_first, velocity_first), strict=True):
        for row, changes in ((name, {"fuse": "blocks"}), (f"{name}{PREDICTIONS}", of_predictions)):
            found[row] = (experts, changes)
            if experts is noise_first:
                found[f"{row}{BY_VELOCITY}"] = (experts, {**changes, **by_velocity})
    if transformers is not None:
        mixed = [velocity[0], str(transformers / "food"), velocity[2]]
        found[FAMILIES] = (mixed, {"fuse": "predictions"})
    return found


def recipe_of(experts: list[str], changes: dict[str, Any], seed: int) -> Recipe:
    """The recipe of one training; all have the same pictures and steps."""
    chosen = {each.name: getattr(AGGREGATOR, each.name) for each in fields(SABWSettings)}
    return Recipe(
        experts=[ExpertSource(each) for each in experts],
        fuse=changes.get("fuse"),
        data=DataRecipe(scenes=scenes(seed)),
        aggregator=SABWSettings(**{**chosen, **changes.get("aggregator", {})}),
        training=training(seed, 1_000, **changes.get("training", {})),
    )


def references(work: Path, transformers: Path | None) -> list[dict[str, Any]]:
    """The experts alone, the base, and merges of those that can be merged."""
    rows: list[dict[str, Any]] = [{"name": "base", "model": SHIPPED.base}]
    rows += [{"name": f"expert: {name}", "model": SHIPPED.experts[name]} for name in EXPERTS]
    rows += [
        {"name": f"expert: {name}, noise", "model": str(noise_of(work, name))} for name in NOISE
    ]
    if transformers is not None:
        rows.append({"name": "expert: food, transformer", "model": str(transformers / "food")})
    rows.append({"name": "weighted merge of noise", "model": str(merged_noise(work))})
    uniform = {"method": "weighted", "weights": [1 / 3] * 3}
    added = {"method": "dare", "density": 0.5, "weights": [1 / 3] * 3}
    rows += [{"name": "weighted merge of velocity", "merge": uniform}]
    return [*rows, {"name": "DARE merge of velocity", "merge": added}]


def merged_noise(work: Path) -> Path:
    """The mean of the experts that predict noise; there is no merge with those of velocity."""
    folder = work / "experts" / "merged-noise"
    if not folder.exists():
        experts = [str(noise_of(work, name)) for name in NOISE]
        for _ in merge_checkpoints(MergeRecipe(method="weighted", experts=experts), folder):
            pass
    return folder


def run(jobs: list[Job], num_processes: int) -> None:
    """Run jobs, and print their progress."""
    for each in run_jobs(jobs, num_processes):
        if each.done % 100 == 0 or each.done == each.total:
            sys.stdout.write(f"{each.name}: {each.done}/{each.total}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
