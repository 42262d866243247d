"""Run by two processes: an ensemble whose experts are sharded between them, against a whole one."""

from __future__ import annotations

import copy

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import afa
from tests.tiny import inputs, tiny_unet
from tests.training.runs import SMALL


def bytes_here(model: torch.nn.Module) -> int:
    """Of the parameters that this process holds."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in held)


def main() -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    whole = afa.EnsembleDenoiser([tiny_unet(seed) for seed in range(3)], SMALL)
    sharded = copy.deepcopy(whole)
    sharded.shard_experts(init_device_mesh("cpu", (distributed.get_world_size(),)))
    share = bytes_here(sharded.experts) / bytes_here(whole.experts)
    assert 0.45 < share < 0.6, share
    assert bytes_here(sharded.aggregators) == bytes_here(whole.aggregators)
    for checkpoints in (False, True):
        gradients = []
        for ensemble in (whole, sharded):
            if checkpoints:
                ensemble.enable_gradient_checkpointing()
            ensemble.zero_grad()
            predicted = ensemble(**inputs()).sample
            predicted.square().mean().backward()
            gradients.append([predicted, *(p.grad for p in ensemble.aggregators.parameters())])
        for expected, came in zip(*gradients, strict=True):
            # gathered weights lie elsewhere in memory, and kernels differ in the last bits by that
            torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-7)
    assert bytes_here(sharded.experts) / bytes_here(whole.experts) == share
    print("all alike")  # noqa: T201
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
