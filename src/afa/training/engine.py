"""One process or several, by accelerate: who does what, and how results come together."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from afa.errors import AfaError
from afa.machine.exhausted import is_of_device

if TYPE_CHECKING:
    from torch import Tensor, nn

    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.training.order import Shares
    from afa.training.recipe import TrainingRecipe

# a process that waits for others which still encode has to be patient
_TIMEOUT = timedelta(hours=24)
_SINGLE = (DistributedType.NO,)
_REPLICATED = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


class Engine:
    """The processes of a training, started by `accelerate launch` or `torchrun`, or just one.

    Aggregators are replicated and their gradients averaged (distributed data parallel). Where
    accelerate is configured for FSDP, the experts' layers are sharded over the processes. Precision
    is the training's own affair: experts are cast, aggregators stay in float32, and whatever mixed
    precision accelerate is configured for is left off.

    Args:
        device: `auto`, or as torch names it; with several processes each has its own.

    Raises:
        AfaError: no such device, or accelerate is configured for something else.
    """

    def __init__(self, device: str = "auto") -> None:
        is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        chosen = pick_device(device) if is_alone else None
        on_cpu = chosen.type == "cpu" if chosen else not torch.accelerator.is_available()
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=_TIMEOUT),
            ],
        )
        kind = self._accelerator.distributed_type
        if kind not in (*_SINGLE, *_REPLICATED, DistributedType.FSDP):
            raise AfaError(
                "AFA-TRAIN-027",
                f"accelerate must be configured for one process, for plain data parallelism (DDP) "
                f"or for FSDP, came {kind.value}. Run `accelerate config` again.",
            )
        self._sharding = _sharding() if self.num_processes > 1 else None
        self.device: torch.device = chosen or self._accelerator.device

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return self._accelerator.process_index

    @property
    def is_sharding(self) -> bool:
        """Whether a forward pass takes all processes, since each holds a part of the experts."""
        return self._sharding is not None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def shares(self, settings: TrainingRecipe) -> Shares:
        """How the places of a step are shared out."""
        from afa.training.order import Shares

        return Shares(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            self.num_processes,
            self.rank,
        )

    def prepare(self, model: nn.Module, frozen: list[str]) -> nn.Module:
        """The model as it is to be called while training.

        Args:
            model: with parameters that are the same in all processes.
            frozen: names of parameters and buffers that need not be kept in step.
        """
        if self.num_processes == 1:
            return model
        # read by DistributedDataParallel: the experts are the same files in all processes
        model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
        if self.is_sharding:  # accelerate would shard the aggregators as well
            return DistributedDataParallel(model, broadcast_buffers=False)
        return self._accelerator.prepare_model(model, device_placement=False)

    def shard(self, ensemble: EnsembleDenoiser) -> None:
        """Leave a part of every expert's layer in each process, where accelerate asks for it."""
        if self._sharding is not None:
            mesh = init_device_mesh(self.device.type, (self.num_processes,))
            ensemble.shard_experts(mesh, **self._sharding)

    def without_sync(self, model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """Gradients are only added up, not averaged over the processes yet."""
        if not when or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        return self._accelerator.reduce(tensor, reduction="mean")

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._accelerator.reduce(tensor, reduction="sum")

    def gather(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        return objects if self.num_processes == 1 else gather_object(objects)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            AfaError: one of them has ended; it has said why.
        """
        try:
            self._accelerator.wait_for_everyone()
        except RuntimeError as error:
            if is_of_device(error):
                raise
            raise AfaError(
                "AFA-TRAIN-028", "All processes must go on, but another one stopped."
            ) from error


def _sharding() -> dict[str, Any] | None:
    """What accelerate's configuration says of FSDP, for `shard_experts`; None without any.

    Raises:
        AfaError: it is of FSDP's first version.
    """
    # not from the accelerator's state, which has none on processors
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise AfaError(
            "AFA-TRAIN-029",
            f"accelerate's fsdp_version must be 2, came {plugin.fsdp_version}. Run `accelerate "
            "config` again, or launch with --fsdp_version 2.",
        )
    chosen: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward}
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        chosen["offload_policy"] = plugin.cpu_offload
    return chosen


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; any other name is taken as it is.

    Raises:
        AfaError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AfaError(
            "AFA-TRAIN-030",
            f"The device must be auto, cpu, or one that this machine has, such as cuda or cuda:1; "
            f"'{name}' cannot be used: {str(error).splitlines()[0]}",
        ) from error
