"""Run a training in one or several processes with accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
)
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from afa.errors import AfaError
from afa.machine.devices import has_shared_gpus
from afa.machine.processes import Processes
from afa.training.order import Shares

if TYPE_CHECKING:
    from torch import Tensor, nn

    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.training.recipe import TrainingRecipe

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.FSDP,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


class Engine:
    """The processes of a training: one, or several started by `accelerate launch` or `torchrun`.

    Aggregators are replicated and their gradients averaged (distributed data parallel). If
    accelerate is configured for FSDP, the experts' layers are sharded over the processes. Mixed
    precision of accelerate's configuration is ignored: experts are cast to `expert_dtype`, and
    aggregators stay in float32.

    Args:
        device: `auto`, or torch's name; ignored with several processes, which get one each.

    Raises:
        AfaError: if there is no such device, or accelerate is configured for another kind of
            parallelism.
    """

    def __init__(self, device: str = "auto") -> None:
        self._processes = Processes()
        self.rank, self.num_processes = self._processes.rank, self._processes.count
        self.is_main, self.wait = self._processes.is_main, self._processes.wait
        chosen = pick_device(device) if self.num_processes == 1 else None
        on_cpu = chosen.type == "cpu" if chosen else not has_shared_gpus()
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        kind = self._accelerator.distributed_type
        if kind not in _SUPPORTED:
            raise AfaError(
                "AFA-TRAIN-027",
                f"accelerate is configured for {kind.value}; it must be configured for one "
                "process, data parallelism (DDP) or FSDP. Run `accelerate config` again.",
            )
        self._sharding = _sharding() if self.num_processes > 1 else None
        self.device: torch.device = chosen or self._accelerator.device

    @property
    def is_sharding(self) -> bool:
        """Whether the experts are sharded, so that a forward pass requires all processes."""
        return self._sharding is not None

    def shares(self, settings: TrainingRecipe) -> Shares:
        """Return how the samples of a step are divided between the processes."""
        return Shares(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            self.num_processes,
            self.rank,
        )

    def part(self, count: int) -> range:
        """Return this process's part of `count` samples, which all processes divide."""
        share = -(-count // self.num_processes)
        return range(count)[self.rank * share : (self.rank + 1) * share]

    def prepare(self, model: nn.Module, frozen: list[str]) -> nn.Module:
        """Return the model to call during training.

        Args:
            model: with the same parameters in all processes.
            frozen: names of parameters and buffers that need no synchronisation.
        """
        if self.num_processes == 1:
            return model
        # DistributedDataParallel reads this; all processes load the experts from the same files
        model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
        if self.is_sharding:  # accelerate would shard the aggregators as well
            return DistributedDataParallel(model, broadcast_buffers=False)
        return self._accelerator.prepare_model(model, device_placement=False)

    def shard(self, ensemble: EnsembleDenoiser) -> None:
        """Shard the experts' layers over the processes, if accelerate is configured for FSDP."""
        if self._sharding is not None:
            mesh = init_device_mesh(self.device.type, (self.num_processes,))
            ensemble.shard_experts(mesh, **self._sharding)

    def without_sync(self, model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """Return a context that accumulates gradients without averaging them over processes."""
        if not when or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        return self._accelerator.reduce(tensor, reduction="mean")

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return self._accelerator.reduce(tensor, reduction="sum")

    def gather(self, objects: list[Any]) -> list[Any]:
        """Concatenate the lists of all processes."""
        return objects if self.num_processes == 1 else gather_object(objects)


def _sharding() -> dict[str, Any] | None:
    """Return accelerate's FSDP settings for `shard_experts`; None without FSDP.

    Raises:
        AfaError: if the version of FSDP is not 2.
    """
    # from the environment, because the accelerator's state has no FSDP settings on CPUs
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise AfaError(
            "AFA-TRAIN-029",
            f"accelerate's fsdp_version must be 2; got {plugin.fsdp_version}. Run `accelerate "
            "config` again, or launch with --fsdp_version 2.",
        )
    chosen: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward}
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        chosen["offload_policy"] = plugin.cpu_offload
    return chosen


def pick_device(name: str) -> torch.device:
    """Return the named device; `auto` is a GPU if there is one, else the CPU.

    Raises:
        AfaError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AfaError(
            "AFA-TRAIN-030",
            f"The device '{name}' cannot be used: {str(error).splitlines()[0].rstrip('.')}. Use "
            "auto, cpu, or a device of this machine, such as cuda or cuda:1.",
        ) from error
