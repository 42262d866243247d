"""Measure one picture by several processes, with one or more experts each, against a prediction.

    python -m benchmarks.scaling

The predicted time of a step of N experts in P processes is the sum of the forward passes of ceil(N
/ P) experts, the aggregators (which every process runs), and the exchange of the features. Each is
measured separately in the same processes. Every process has one thread and communicates through
gloo. Accelerators use NCCL; the column of bytes is the data that has to be transferred.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import spread

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = ("(64, 128, 256)", "(160, 320, 640, 640)")
COUNTS = (2, 4)


def main() -> None:
    """Measure every size and number of experts with one process per core."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        _measure(**json.loads(arguments.one))
        return
    results = []
    for size in arguments.sizes:
        for count in COUNTS:
            cell = {"size": size, "num_experts": count, "num_rounds": arguments.rounds}
            alone = _run(1, cell)
            spread_out = _run(arguments.processes, cell)
            modelled = spread_out["experts"] + spread_out["aggregators"] + spread_out["exchange"]
            results.append(
                {
                    **cell,
                    "num_processes": arguments.processes,
                    "alone": alone["step"],
                    "measured": spread_out["step"],
                    "modelled": modelled,
                    "parts": {k: v for k, v in spread_out.items() if k != "step"},
                }
            )
            sys.stderr.write(f"{results[-1]}\n")
    print(json.dumps(results, indent=1))  # noqa: T201


def _run(num_processes: int, cell: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    command += [str(num_processes), "--standalone", "-m", "benchmarks.scaling"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--one", json.dumps(cell)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(size: str, num_experts: int, num_rounds: int) -> None:
    """Measure in one of the processes; the first one prints the result."""
    import torch
    from torch import distributed

    from afa import EnsembleDenoiser, SABWConfig
    from benchmarks.models import build_unet, example

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    experts = [build_unet(size) for _ in range(num_experts)]
    ensemble = EnsembleDenoiser(experts, SABWConfig())
    together, own = example(experts[0], size, num_experts, 32, 2, torch.float32)
    ensemble.spread_experts()
    exchange: Any = ensemble.exchange
    steps = iter(range(1_000_000, 0, -1))
    spent: dict[str, float] = {}

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - began
            return result

        return call

    def lasts(function: Callable[[], Any]) -> float:
        distributed.barrier()
        began = time.perf_counter()
        function()
        distributed.barrier()
        return time.perf_counter() - began

    def step() -> None:
        ensemble(timestep=next(steps), **together)

    def forwards() -> None:
        for n in exchange.own:
            experts[n](timestep=500, **own[n])

    def send(shapes: list[tuple[int, ...]]) -> None:
        for shape in shapes:
            exchange._gather([torch.empty(shape)] * len(exchange.own))

    shapes: list[tuple[int, ...]] = []
    gather = exchange.features

    def noted(site: str, features: Any) -> Any:
        shapes.append(tuple(features[0].hidden.shape))
        return gather(site, features)

    exchange.features = noted
    with torch.no_grad():
        step()
        exchange.features = gather
        forwards()
        send(shapes)
        rounds = []
        for _ in range(num_rounds):
            rounds.append({"step": lasts(step), "experts": lasts(forwards)})
            rounds[-1]["exchange"] = lasts(lambda: send(shapes))
            spent.clear()
            rules = list(dict.fromkeys(ensemble.aggregators))
            own_forwards = [rule.forward for rule in rules]
            for rule in rules:
                rule.forward = timed(rule.forward, "aggregators")
            step()
            for rule, forward in zip(rules, own_forwards, strict=True):
                rule.forward = forward
            rounds[-1]["aggregators"] = spent["aggregators"]
    if distributed.get_rank() == 0:
        result = {key: spread([seen[key] for seen in rounds]).median for key in rounds[0]}
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        print(json.dumps({**result, "megabytes": numbers * 4 / 1e6}))  # noqa: T201
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
