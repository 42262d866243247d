"""Measure time and memory of a picture by one model, a merge and an ensemble of the zoo.

    python -m benchmarks.picture

Each is measured at every speed with the same number of steps. Times alternate in one process. Peak
memory is measured in one process each, without the memory of the imports. The quality is measured
by `benchmarks.acceleration_study`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.memory import peak, resident
from benchmarks.rounds import ratio, take_turns

ONE, MERGE, ENSEMBLE = "one model", "merge", "ensemble"
SPEEDS = ("exact", "balanced", "fast")
PROMPT = "a fox on the left and a pizza on the right, blue background"


def build(way: str, speed: str) -> Any:
    """Build a pipeline."""
    import afa
    from afa.evaluation.methods import MethodBuilder
    from afa.evaluation.recipe import EvaluateRecipe

    experts = ["zoo:animals", "zoo:food", "zoo:things"]
    ways: dict[str, dict[str, Any]] = {
        ONE: {"model": experts[0]},
        MERGE: {"merge": {"method": "weighted"}},
        ENSEMBLE: {"ensemble": "zoo:ensemble"},
    }
    recipe = EvaluateRecipe.model_validate(
        {
            "experts": experts,
            "prompts": {"zoo": {"kinds": {"mixed": 1}}},
            "methods": [{"name": way, "acceleration": speed, **ways[way]}],
            "metrics": ["scenes"],
            "sampling": {"device": "cpu"},
        }
    )
    assert afa.__version__
    return MethodBuilder(recipe, recipe.sampling).build(recipe.methods[0])


def draw(pipeline: Any, num_pictures: int) -> None:
    """Draw a batch of pictures with 20 steps."""
    pipeline([PROMPT] * num_pictures, num_inference_steps=20, guidance_scale=3)


def measure(num_rounds: int, num_threads: int, batch: int) -> list[dict[str, Any]]:
    """Measure all methods at all speeds."""
    import torch

    torch.set_num_threads(num_threads)
    names = [(way, speed) for way in (ONE, MERGE, ENSEMBLE) for speed in SPEEDS]
    pipelines = {name: build(*name) for name in names}
    functions = {
        " ".join(name): (lambda p=pipeline: draw(p, batch)) for name, pipeline in pipelines.items()
    }
    seconds = take_turns(functions, num_rounds)
    first = " ".join(names[0])
    results = []
    for way, speed in names:
        key = f"{way} {speed}"
        command = [sys.executable, "-m", "benchmarks.picture", "--one", way, speed]
        options = ["--threads", str(num_threads), "--batch", str(batch)]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        results.append(
            {
                "way": way,
                "speed": speed,
                "batch": batch,
                "num_threads": num_threads,
                "num_rounds": num_rounds,
                "seconds": statistics.median(seconds[key]) / batch,
                "ratio": ratio(seconds, key, first).as_json(),
                **json.loads(done.stdout.splitlines()[-1]),
            }
        )
    return results


def memory(way: str, speed: str, num_threads: int, batch: int) -> dict[str, int]:
    """Return the peak memory of this process in bytes, without the imports."""
    import diffusers
    import torch

    torch.set_num_threads(num_threads)
    assert diffusers.StableDiffusionPipeline
    imports = resident()
    draw(build(way, speed), batch)
    return {"memory": peak() - imports}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = (arguments.threads, arguments.batch)
    if arguments.one is not None:
        way, speed = arguments.one
        print(json.dumps(memory(way, speed, *options)))  # noqa: T201
        return
    print(json.dumps(measure(arguments.rounds, *options), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
