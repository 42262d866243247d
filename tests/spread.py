"""Run by several processes: experts spread over them, against all in one process."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import distributed

import afa
from tests.ensemble.caching.test_loop import arguments_of, draw, ensemble_of
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal

FAMILIES = ("unet", "sdxl", "flux", "sd3", "pixart", "dit")


def check(name: str, ensemble: Any, arguments: dict[str, Any]) -> None:
    """Spread the experts of a copy, and see that it gives the same."""
    expected = draw(ensemble, arguments)
    spread = copy.deepcopy(ensemble)
    spread.acceleration = ensemble.acceleration
    spread.spread_experts()
    own = spread.exchange.own
    for n, expert in enumerate(spread.experts):
        assert all(p.is_meta == (n not in own) for p in expert.parameters()), name
    assert spread.device.type == "cpu"
    with afa.record_weights(spread) as record:
        came = draw(spread, arguments)
    for a, b in zip(came, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {(a - b).abs().max()}"
    for place in (spread.stream_experts, lambda: spread.place_experts(["cpu"] * 3)):
        with refusal("AFA-ENSEMBLE-018", "with experts spread over processes"):
            place()
    assert record.mean_share().shape[-1] == len(ensemble.experts)


def main() -> None:
    distributed.init_process_group("gloo")
    count = distributed.get_world_size()
    for family in FAMILIES:
        check(family, ensemble_of(family, 3), arguments_of(family, 3))
    cached = ensemble_of("unet", 3)
    cached.acceleration = afa.Acceleration(interval=2, keep_weights=True)
    check("cached", cached, arguments_of("unet", 3))
    parted = afa.EnsembleDenoiser(
        list(ensemble_of("unet", 3).experts),
        afa.SABWConfig(
            hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4, sites="conv_out"
        ),
    )
    check("parted", parted, arguments_of("unet", 3))
    pruned = ensemble_of("unet", 3)
    pruned.plan = plan_of(pruned, {"mid": [0]})
    with refusal("AFA-ENSEMBLE-018", "with a pruning plan"):
        pruned.spread_experts()
    if count > 1:
        with refusal("AFA-ENSEMBLE-037", f"{count} processes for 1 experts"):
            ensemble_of("unet", 1).spread_experts()
    if distributed.get_rank() == 0:
        sys.stdout.write(f"all alike over {count}\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
