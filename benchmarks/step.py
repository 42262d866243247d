"""Measure one step of an ensemble, relative to its experts' own forward passes.

    python -m benchmarks.step                                  # all cells, an hour
    python -m benchmarks.step --sizes "(64, 128, 256)" --rounds 9

These alternate in one process: the diffusers forward passes of the experts, one after another; the
ensemble with the uniform mean; the ensemble with SABW, in the paper's shape and in the default one.
The floor is the ratio of their operation counts, in which only products count. Weights are random.
The prompt stays the same and the timesteps fall, as in a denoising loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

EXPERTS, MEAN, PAPER, DEFAULT = "experts", "mean", "the paper's SABW", "the default SABW"
#: shapes of aggregators: the same size everywhere, and one that follows the experts' widths
SHAPES: dict[str, dict[str, Any]] = {PAPER: {"hidden_ratio": None, "min_scale": 1}, DEFAULT: {}}
COUNTS, LATENTS = (1, 2, 3, 4, 6), (16, 32, 64)
#: sizes with steps of seconds; measured with fewer settings
LARGE = ("Stable Diffusion 1.5", "Stable Diffusion XL")


def cells(sizes: list[str]) -> list[dict[str, Any]]:
    """List the cells: at every width, one setting changed from three experts at 32x32.

    The large sizes have fewer cells.
    """
    listed = []
    for size in sizes:
        usual = {"size": size, "num_experts": 3, "latent": 32, "dtype": "float32"}
        usual["compiled"] = False
        listed.append(usual)
        is_large = size in LARGE
        counts, latents = ((1, 2), ()) if is_large else (COUNTS, LATENTS)
        listed += [{**usual, "num_experts": n} for n in counts if n != 3]
        listed += [{**usual, "latent": latent} for latent in latents if latent != 32]
        listed.append({**usual, "dtype": "bfloat16"})
        listed += [] if is_large else [{**usual, "compiled": True}]
    return listed


def measure(cell: dict[str, Any], num_rounds: int, num_threads: int, batch: int) -> dict[str, Any]:
    """Time one cell in this process."""
    import torch

    from afa import EnsembleDenoiser
    from afa.aggregators import SABWConfig
    from afa.zoo.models import AGGREGATOR
    from benchmarks.models import ZOO, build_unet, example
    from benchmarks.rounds import ratio, take_turns

    torch.set_num_threads(num_threads)
    size, count, dtype = cell["size"], cell["num_experts"], getattr(torch, cell["dtype"])
    # random weights: the largest experts share one model, which takes the same time
    distinct = 1 if size == "Stable Diffusion XL" or count > 3 else count
    unets = [build_unet(size, dtype) for _ in range(distinct)]
    experts = [unets[n % distinct] for n in range(count)]
    together, own = example(experts[0], size, count, cell["latent"], batch, dtype)

    def run_experts() -> None:
        for expert, arguments in zip(experts, own, strict=True):
            expert(timestep=500, **arguments)

    def runner(ensemble: EnsembleDenoiser) -> Any:
        steps = iter(range(1_000_000, 0, -1))
        return lambda: ensemble(timestep=next(steps), **together)

    usual = AGGREGATOR if size == ZOO else SABWConfig()
    ensembles = {MEAN: EnsembleDenoiser(experts)}
    for name, changes in SHAPES.items():
        ensembles[name] = EnsembleDenoiser(experts, replace(usual, **changes))
    with torch.no_grad():
        functions = {EXPERTS: run_experts, **{k: runner(e) for k, e in ensembles.items()}}
        for function in functions.values():
            function()  # computes the keys and values of the prompt
        floors = {
            name: count_operations(functions[name]) / count_operations(run_experts)
            for name in SHAPES
        }
        if cell["compiled"]:
            for ensemble in ensembles.values():
                ensemble.compile_repeated_blocks()  # all ensembles share the experts
        seconds = take_turns(functions, num_rounds, num_warmups=2 if cell["compiled"] else 1)
        shares = {name: aggregator_share(ensembles[name], functions[name]) for name in SHAPES}
    return {
        **cell,
        "batch": batch,
        "num_threads": num_threads,
        "num_rounds": num_rounds,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "ratios": {name: ratio(seconds, name, EXPERTS).as_json() for name in ensembles},
        "floors": floors,
        "aggregators": shares,
        "parameters": {
            name: sum(p.numel() for p in ensembles[name].aggregators.parameters())
            for name in SHAPES
        },
    }


def count_operations(function: Any) -> int:
    """Count the floating-point operations of convolutions, matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def aggregator_share(ensemble: Any, function: Any) -> float:
    """Return the aggregators' share of a step's time."""
    import time

    spent: list[float] = []

    def begin(*_: Any) -> None:
        spent.append(-time.perf_counter())

    def end(*_: Any) -> None:
        spent[-1] += time.perf_counter()

    hooks = []
    for rule in {id(rule): rule for rule in ensemble.aggregators}.values():
        hooks += [rule.register_forward_pre_hook(begin), rule.register_forward_hook(end)]
    began = time.perf_counter()
    function()
    whole = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    return sum(spent) / whole


def measure_all(listed: list[dict[str, Any]], options: list[str]) -> list[dict[str, Any]]:
    """Measure every cell in its own process."""
    results = []
    for cell in listed:
        command = [sys.executable, "-m", "benchmarks.step", *options, "--one", json.dumps(cell)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        sys.stderr.write(f"{line(results[-1])}\n")
    return results


def line(result: dict[str, Any]) -> str:
    """Format one cell as text."""
    ratios = "  ".join(
        f"{name} {value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        + (f" floor {result['floors'][name]:.3f}" if name in result["floors"] else "")
        for name, value in result["ratios"].items()
    )
    return (
        f"{result['size']}, N={result['num_experts']}, {result['latent']}x{result['latent']}, "
        f"{result['dtype']}{', compiled' * result['compiled']}: "
        f"experts {result['seconds'][EXPERTS]:.4g} s; {ratios}"
    )


def main() -> None:
    """Measure the requested cells."""
    from benchmarks.models import UNETS, ZOO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=[ZOO, *UNETS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only-usual", action="store_true", help="three experts at 32x32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        result = measure(
            json.loads(arguments.one), arguments.rounds, arguments.threads, arguments.batch
        )
        print(json.dumps(result))  # noqa: T201
        return
    listed = cells(arguments.sizes)
    if arguments.only_usual:
        listed = [cells([size])[0] for size in arguments.sizes]
    options = ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    options += ["--batch", str(arguments.batch)]
    print(json.dumps(measure_all(listed, options), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
