"""Measure what drafts add to a picture.

    python -m benchmarks.drafting

A batch of the bundled ensemble by its aggregators, the same by drafts that the zoo's base judges,
and one expert alone, in turn and in one process. Drafts do not change training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import torch

from afa.drafting import DraftsRecipe, use_drafts
from afa.evaluation.cost import measure
from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.work import draw
from afa.loading.ensemble_folder import load_ensemble
from afa.loading.expert_source import ExpertSource
from afa.loading.pipeline import load_single
from afa.zoo.scenes import caption_of
from benchmarks.rounds import ratio, take_turns

_PROMPTS = [caption_of("fox", "pizza", name) for name in ("blue", "green", "pink", "black")]
_SAMPLING = SamplingRecipe(guidance=3.0, batch_size=len(_PROMPTS))


def main() -> None:
    """Print a row for each number of steps as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    arguments = parser.parse_args()
    pipelines = {
        "aggregators": load_ensemble("zoo:ensemble"),
        "drafts": load_ensemble("zoo:ensemble"),
        "expert": load_single("zoo:animals")[0],
    }
    use_drafts(pipelines["drafts"], DraftsRecipe(judge=ExpertSource("zoo:base")))
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    rows = []
    for steps in arguments.steps:
        drawn = {
            name: partial(draw, pipeline, _PROMPTS, range(len(_PROMPTS)), 0, steps, _SAMPLING)
            for name, pipeline in pipelines.items()
        }
        calls = {}
        for name, function in drawn.items():
            with measure(pipelines[name]) as cost:
                function()
            calls[name] = cost.expert_calls
        seconds = take_turns(drawn, arguments.rounds, num_warmups=0)
        rows.append(
            {
                "what": f"drafts / aggregators, {steps} steps",
                "num_rounds": arguments.rounds,
                "ratio": ratio(seconds, "drafts", "aggregators").as_json(),
                "to_expert": ratio(seconds, "aggregators", "expert").as_json(),
                "calls": {name: (count or 0) / len(_PROMPTS) for name, count in calls.items()},
                **{f"seconds_{name}": statistics.median(each) for name, each in seconds.items()},
            }
        )
    print(json.dumps(rows, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
