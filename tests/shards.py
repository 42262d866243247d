"""Run by two processes: drawing with sharded experts, and what cannot be combined with them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import afa
from afa.ensemble.combinations import EXCLUDED
from afa.ensemble.regions import Regions
from tests.ensemble.caching.test_graphs import Replays
from tests.ensemble.caching.test_loop import arguments_of, ensemble_of
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal

#: by process, how large the latent is at each step, by what it was at the first
SIZES = [(1.0, 1.8, 1.8, 1.8), (1.0, 1.0, 1.0, 1.8)]


def steps_of(rank: int) -> list[dict[str, Any]]:
    """The calls of one picture, another one in each process."""
    arguments = arguments_of("unet", 2)
    base = torch.randn(arguments["sample"].shape, generator=torch.Generator().manual_seed(rank))
    return [
        {**arguments, "sample": size * base, "timestep": torch.tensor([step, step])}
        for step, size in zip((900, 700, 500, 300), SIZES[rank], strict=True)
    ]


def decide_together(whole: Any, mesh: DeviceMesh) -> None:
    """Whichever process's latent has moved, all compute the step in full."""
    sharded = copy.deepcopy(whole)
    sharded.shard_experts(mesh)
    sharded.acceleration = afa.Acceleration(interval=9, drift=0.7)
    whole.acceleration = afa.Acceleration(interval=2, first=2)  # in full: all but the third
    for call in steps_of(distributed.get_rank()):
        came, expected = (e(**call, return_dict=False)[0] for e in (sharded, whole))
        # gathered weights lie elsewhere in memory, and kernels differ in the last bits by that
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-6)


def stop_together(whole: Any, mesh: DeviceMesh) -> None:
    """One process's prediction is not finite; the other does not wait for it."""
    whole.shard_experts(mesh)
    call = steps_of(0)[0]
    if distributed.get_rank() == 1:
        call["sample"][0, 0, 0, 0] = torch.inf
    with refusal("AFA-ENSEMBLE-028"):
        whole(**call)


def exclude(whole: Any, mesh: DeviceMesh) -> None:
    """In both orders."""
    switches: dict[str, Callable[[Any], None]] = {
        "a pruning plan": lambda e: setattr(e, "plan", plan_of(e, {"mid": [0]})),
        "a schedule": lambda e: setattr(e, "schedule", lambda _: [0]),
        "CUDA graphs": lambda e: setattr(e, "graphs", Replays()),
        "experts spread over processes": lambda e: e.spread_experts(),
        "sharded experts": lambda e: e.shard_experts(mesh),
        "experts on several devices": lambda e: e.place_experts(["cpu", "cpu"]),
        "offloaded experts": lambda e: e.offload_experts("cpu"),
        "streamed experts": lambda e: e.stream_experts(),
        "a bias by region": lambda e: setattr(e, "regions", Regions(torch.zeros(2, 2, 4, 4))),
        "drafts": lambda e: setattr(e, "drafter", SimpleNamespace(is_drawing=True)),
    }
    sharded = copy.deepcopy(whole)
    sharded.shard_experts(mesh)
    pairs = [{one, other} for one, other, *_ in EXCLUDED if "sharded experts" in (one, other)]
    assert len(pairs) == len(switches)
    for pair in pairs:
        (other,) = pair - {"sharded experts"} or {"sharded experts"}
        with refusal("AFA-ENSEMBLE-018", "with sharded experts"):
            switches[other](sharded)
        before = copy.deepcopy(whole)
        switches[other](before)
        with refusal("AFA-ENSEMBLE-018", f"Sharded experts .* with {other}"):
            before.shard_experts(mesh)


def main() -> None:
    # processes that disagree would wait for each other
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    with torch.no_grad():
        for check in (decide_together, stop_together, exclude):
            check(ensemble_of("unet", 2), mesh)
    if distributed.get_rank() == 0:
        sys.stdout.write("all alike\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
